//! What else has a say in what becomes of an agent's packets: programs of others on the cgroups above
//! a root, and translation on output.

use std::{collections::BTreeMap, fs, process::Command};

use super::{Check, State};
use crate::{
    cgroup::{CgroupPath, Hierarchy},
    kernel::programs_on,
};

/// Programs on the ancestors of the roots. They run after Remit's, and see what those decided.
pub fn programs(hierarchy: &Hierarchy, roots: &[CgroupPath]) -> Check {
    let name = "programs above the roots";
    let mend = "one that calls `bpf_set_retval(0)` at connect undoes a refusal there, though egress \
                refuses the packets all the same: `bpftool cgroup show DIRECTORY` says whose it is";
    let mut above: Vec<CgroupPath> = roots
        .iter()
        .flat_map(|root| std::iter::successors(root.parent(), CgroupPath::parent))
        .filter(|path| !roots.contains(path))
        .collect();
    above.sort();
    above.dedup();
    let mut told = Vec::new();
    for path in above {
        let programs = match programs_on(&hierarchy.directory(&path)) {
            Ok(programs) => programs,
            Err(error) => {
                let found = format!("cannot be asked of `{path}`: {error}");
                return Check::new(name, State::Unknown, found, mend);
            }
        };
        let mut hooks: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (hook, id) in programs {
            hooks.entry(hook).or_default().push(id.to_string());
        }
        let each = hooks
            .into_iter()
            .map(|(hook, ids)| format!("{hook} of `{path}`: {}", ids.join(", ")));
        told.extend(each);
    }
    if told.is_empty() {
        return Check::new(name, State::Ok, "none on the hooks that Remit uses", mend);
    }
    Check::new(name, State::Watch, told.join("; "), mend)
}

/// The fence judges packets after translation on output, and connect before it.
pub fn translation() -> Check {
    let name = "NAT on output";
    let mend = "grant both the address before and after translation; a refusal says `translated`";
    let legacy = fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
    let legacy = legacy.lines().any(|table| table == "nat");
    let listed = Command::new("nft").args(["list", "chains"]).output();
    let chains = match listed {
        Ok(output) if output.status.success() => {
            Some(output_chains(&String::from_utf8_lossy(&output.stdout)))
        }
        Ok(_) | Err(_) => None,
    };
    let mut told = Vec::new();
    if legacy {
        told.push("iptables (legacy) has a nat table".to_owned());
    }
    if let Some(chains) = chains.as_ref().filter(|chains| !chains.is_empty()) {
        told.push(format!("nftables: {}", chains.join(", ")));
    }
    match (told.is_empty(), chains) {
        (false, _) => {
            let found = format!(
                "destinations may change behind connect: {}",
                told.join("; ")
            );
            Check::new(name, State::Watch, found, mend)
        }
        (true, Some(_)) => Check::new(name, State::Ok, "no chain does", mend),
        (true, None) => {
            let found = "not told: no `nft` that answers, and no legacy nat table";
            Check::new(name, State::Unknown, found, mend)
        }
    }
}

/// The chains of `nft list chains` that translate on output, with their tables.
fn output_chains(text: &str) -> Vec<String> {
    let (mut table, mut chain) = ("", "");
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        let named = |kind: &str| Some(line.strip_prefix(kind)?.trim_end_matches('{').trim());
        if let Some(name) = named("table ") {
            table = name;
        } else if let Some(name) = named("chain ") {
            chain = name;
        } else if line.starts_with("type nat hook output") {
            found.push(format!("chain {chain} of table {table}"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_translate_on_output_are_named() {
        let text = "table ip nat {\n\tchain PREROUTING {\n\t\ttype nat hook prerouting priority \
                    dstnat; policy accept;\n\t}\n\tchain OUTPUT {\n\t\ttype nat hook output priority \
                    -100; policy accept;\n\t}\n}\ntable inet filter {\n\tchain output {\n\t\ttype \
                    filter hook output priority filter; policy accept;\n\t}\n}\n";
        assert_eq!(output_chains(text), ["chain OUTPUT of table ip nat"]);
        assert!(output_chains("").is_empty());
    }
}
