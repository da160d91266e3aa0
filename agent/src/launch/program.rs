//! Which file a command's name means, found before anything is made, and the memory that
//! `execve(2)` will need.

use std::{
    ffi::{CString, OsStr, OsString},
    fs,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::PermissionsExt as _,
    },
    path::{Path, PathBuf},
    ptr,
};

use super::{Error, c_string};

/// Where execvp(3) looks without PATH.
const DEFAULT_PATH: &str = "/bin:/usr/bin";
/// Runs files that are executable but of no known format, as execvp(3) does.
const SHELL: &str = "/bin/sh";

/// A command and the files that it may mean, best first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    argv: Vec<OsString>,
    files: Vec<PathBuf>,
}

/// One file to try, with its arguments as the kernel takes them. The pointers go into `strings`.
pub(super) struct Image {
    pub(super) file: CString,
    pub(super) argv: Vec<*const libc::c_char>,
    /// The same for [`SHELL`], in case the file has no known format.
    pub(super) shell: CString,
    pub(super) shell_argv: Vec<*const libc::c_char>,
}

/// All files to try, and the environment.
pub(super) struct Images {
    pub(super) images: Vec<Image>,
    pub(super) environment: Vec<*const libc::c_char>,
    /// Owns what the pointers point to.
    #[expect(dead_code, reason = "kept alive for the pointers into it")]
    strings: Vec<CString>,
}

enum Kind {
    Missing,
    NotExecutable,
    Executable,
}

// === impl Program ===

impl Program {
    /// Finds the files that `argv[0]` may mean: itself when it has a slash in it, else those of
    /// that name in the directories of `path`. Whether the user may execute them shows at exec.
    pub(super) fn find(argv: Vec<OsString>, path: Option<&OsStr>) -> Result<Self, Error> {
        let Some(name) = argv.first() else {
            return Err(Error::NoCommand);
        };
        let shown = name.to_string_lossy().into_owned();
        let mut files = Vec::new();
        let mut barred = false;
        for file in places(name, path.unwrap_or(OsStr::new(DEFAULT_PATH))) {
            match kind(&file) {
                Kind::Executable => files.push(file),
                Kind::NotExecutable => barred = true,
                Kind::Missing => {}
            }
        }
        match (files.is_empty(), barred) {
            (false, _) => Ok(Self { argv, files }),
            (true, true) => Err(Error::NotExecutable(shown)),
            (true, false) => Err(Error::NotFound(shown)),
        }
    }

    /// The name as it was given.
    pub fn name(&self) -> String {
        match self.argv.first() {
            Some(name) => name.to_string_lossy().into_owned(),
            None => String::new(),
        }
    }

    /// The file that will be executed, if the user may.
    pub fn file(&self) -> Option<&Path> {
        self.files.first().map(PathBuf::as_path)
    }

    pub(super) fn images(&self, environment: &[(OsString, OsString)]) -> Result<Images, Error> {
        let mut strings = Vec::new();
        let mut arguments = Vec::new();
        for argument in &self.argv {
            arguments.push(keep(&mut strings, argument.clone())?);
        }
        let mut images = Vec::new();
        for file in &self.files {
            let path = keep(&mut strings, file.clone().into_os_string())?;
            let rest = arguments.iter().skip(1).copied();
            let shell = keep(&mut strings, SHELL.into())?;
            images.push(Image {
                file: c_string(file.clone().into_os_string())?,
                argv: ended(arguments.iter().copied()),
                shell: c_string(SHELL.into())?,
                shell_argv: ended([shell, path].into_iter().chain(rest)),
            });
        }
        let mut variables = Vec::new();
        for (name, value) in environment {
            let mut line = name.clone();
            line.push("=");
            line.push(value);
            variables.push(keep(&mut strings, line)?);
        }
        Ok(Images {
            images,
            environment: ended(variables.into_iter()),
            strings,
        })
    }
}

/// Moves a string to where it stays; the heap part of a `CString` never moves with it.
fn keep(strings: &mut Vec<CString>, text: OsString) -> Result<*const libc::c_char, Error> {
    let text = c_string(text)?;
    let pointer = text.as_ptr();
    strings.push(text);
    Ok(pointer)
}

fn ended(pointers: impl Iterator<Item = *const libc::c_char>) -> Vec<*const libc::c_char> {
    pointers.chain([ptr::null()]).collect()
}

fn places(name: &OsStr, path: &OsStr) -> Vec<PathBuf> {
    if name.is_empty() {
        return Vec::new();
    }
    if name.as_bytes().contains(&b'/') {
        return vec![PathBuf::from(name)];
    }
    path.as_bytes()
        .split(|byte| *byte == b':')
        .map(|directory| match directory {
            // An empty entry is the working directory (POSIX, "PATH").
            b"" => Path::new(".").join(name),
            directory => PathBuf::from(OsString::from_vec(directory.to_vec())).join(name),
        })
        .collect()
}

fn kind(file: &Path) -> Kind {
    match fs::metadata(file) {
        Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => {
            Kind::Executable
        }
        Ok(_) => Kind::NotExecutable,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Kind::NotExecutable,
        Err(_) => Kind::Missing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(directory: &Path, name: &str, mode: u32) {
        let file = directory.join(name);
        fs::write(&file, "").unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn find(name: &str, path: &OsStr) -> Result<Program, Error> {
        Program::find(vec![name.into(), "argument".into()], Some(path))
    }

    #[test]
    fn names_are_found_as_a_shell_finds_them() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        file(one.path(), "plain", 0o644);
        file(one.path(), "both", 0o755);
        file(two.path(), "both", 0o755);
        file(two.path(), "second", 0o700);
        fs::create_dir(one.path().join("second")).unwrap();
        let path = std::env::join_paths([one.path(), two.path()]).unwrap();

        let both = find("both", &path).unwrap();
        assert_eq!(
            both.files,
            [one.path().join("both"), two.path().join("both")]
        );
        assert_eq!(both.file(), Some(one.path().join("both").as_path()));
        let second = find("second", &path).unwrap();
        assert_eq!(second.files, [two.path().join("second")]);
        assert_eq!(find("plain", &path).unwrap_err().exit_code(), Some(126));
        assert_eq!(find("nowhere", &path).unwrap_err().exit_code(), Some(127));
        assert_eq!(find("", &path).unwrap_err().exit_code(), Some(127));
    }

    #[test]
    fn a_name_with_a_slash_is_a_path() {
        let directory = tempfile::tempdir().unwrap();
        file(directory.path(), "here", 0o755);
        let name = directory.path().join("here");
        let program = find(name.to_str().unwrap(), OsStr::new("/bin")).unwrap();
        assert_eq!(program.files, [name]);
        let folder = directory.path().to_str().unwrap();
        let error = find(folder, OsStr::new("/bin")).unwrap_err();
        assert_eq!(error.exit_code(), Some(126));
        let missing = format!("{folder}/missing");
        let error = find(&missing, OsStr::new("/bin")).unwrap_err();
        assert_eq!(error.exit_code(), Some(127));
    }

    #[test]
    fn an_empty_entry_is_the_working_directory() {
        assert_eq!(
            places(OsStr::new("x"), OsStr::new("/a::/b")),
            [Path::new("/a/x"), Path::new("./x"), Path::new("/b/x")]
        );
    }

    #[test]
    fn no_command_and_nul_bytes_are_errors() {
        assert!(matches!(
            Program::find(Vec::new(), None),
            Err(Error::NoCommand)
        ));
        let argv = vec!["/bin/sh".into(), "a\0b".into()];
        let program = Program::find(argv, None).unwrap();
        assert!(matches!(program.images(&[]), Err(Error::Nul(text)) if text == "a\0b"));
    }

    #[test]
    fn every_list_ends_with_a_null() {
        let program = Program::find(vec!["/bin/sh".into(), "-c".into()], None).unwrap();
        let images = program.images(&[("A".into(), "b".into())]).unwrap();
        let image = &images.images[0];
        assert_eq!((image.argv.len(), image.shell_argv.len()), (3, 4));
        assert_eq!(images.environment.len(), 2);
        for list in [&image.argv, &image.shell_argv, &images.environment] {
            assert!(list.last().unwrap().is_null());
            assert!(
                list[..list.len() - 1]
                    .iter()
                    .all(|pointer| !pointer.is_null())
            );
        }
    }
}
