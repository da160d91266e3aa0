//! Whether a fence stands, by its pins alone: for those who load nothing and want to know.

use std::{
    fs::File,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
};

use super::{
    attach::pin_name,
    object::{Expected, HOOKS},
    pins::{Known, LinkPin, Survey},
    sys,
};

/// Reads back whether every hook of the root cgroup `root`, whose directory is `directory`, has a
/// link that is pinned below `base`, by whatever version, with a program of Remit's that the kernel
/// runs there. The error says what is missing.
pub fn standing(base: &Path, root: &str, directory: &Path) -> Result<(), String> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error: std::io::Error| format!("cannot read `{path}`: {error}")
    };
    let survey = Survey::read(base).map_err(failed(base))?;
    let known = survey.known();
    let name = pin_name(root);
    let cgroup = File::open(directory).map_err(failed(directory))?;
    let id = cgroup.metadata().map_err(failed(directory))?.ino();
    for expected in HOOKS {
        let mut why = "no link is pinned".to_owned();
        let stands = survey
            .links
            .iter()
            .filter(|pin| pin.root == name && pin.program == expected.program)
            .any(|pin| match holds(pin, expected, id, &cgroup, &known) {
                Ok(()) => true,
                Err(fault) => {
                    why = fault;
                    false
                }
            });
        if !stands {
            return Err(format!("{}: {why}", expected.hook));
        }
    }
    Ok(())
}

fn holds(
    pin: &LinkPin,
    expected: Expected,
    id: u64,
    cgroup: &File,
    known: &Known,
) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("its link cannot be read: {error}");
    let link = sys::open_pin(&pin.path).map_err(failed)?;
    let info = sys::link_info(link.as_fd()).map_err(failed)?;
    if info.cgroup != id || info.attach_type != expected.attach_type {
        return Err("its link is on another cgroup".to_owned());
    }
    if !known.contains_key(&info.program) {
        let program = info.program;
        return Err(format!(
            "remit did not put program {program} under its link"
        ));
    }
    let listed = sys::attached_programs(cgroup.as_fd(), expected.attach_type).map_err(failed)?;
    if listed.contains(&info.program) {
        Ok(())
    } else {
        Err("the kernel does not run its program there".to_owned())
    }
}
