//! The entries of scopes, sets and floors: from documents into the model.

use super::{
    document::{GrantDocument, PortDocument, ServeDocument},
    model::{Client, Grant, Serve, Target},
    name::Destination,
    net::{Cidr, CidrError, PortSpec, Ports},
    reader::{At, Notes},
    source::Span,
    tables::UnixMillis,
};

/// A `[[scope.serve]]`.
pub(super) fn serve_entry(
    index: usize,
    entry: &ServeDocument,
    notes: &mut Notes<'_>,
) -> Option<Serve> {
    let path = format!("scope.serve[{index}]");
    let ports = ports(entry.ports.as_ref(), &path, &entry.span, true, notes);
    let clients = entry.from.as_ref();
    if clients.is_none_or(|list| list.value.is_empty()) {
        let span = clients.map_or(&entry.span, |list| &list.span);
        let key = format!("{path}.from");
        let help = "say who may be answered: `from = [\"10.0.0.0/8\", \"loopback\"]`";
        notes.missing(&key, span, format!("`{key}` names nobody"), help);
    }
    let mut from = Vec::new();
    for each in clients.iter().flat_map(|list| &list.value) {
        if each.value == "loopback" {
            from.push(Client::Loopback);
            continue;
        }
        let parsed = each.value.parse::<Cidr>();
        let help = |error: &CidrError| format!("{}; \"loopback\" is this host", error.help());
        from.extend(notes.parsed(&each.span, parsed, help).map(Client::Net));
    }
    Some(Serve {
        index,
        ports: ports?,
        from,
        span: entry.span.clone(),
    })
}

/// The grants of a list called `list`, without the wrong ones.
pub(super) fn grants(
    documents: &[GrantDocument],
    list: &str,
    now: UnixMillis,
    notes: &mut Notes<'_>,
) -> Vec<Grant> {
    let entries = documents.iter().enumerate();
    entries
        .filter_map(|(index, entry)| {
            let path = format!("{list}[{index}]");
            let ports = ports(entry.ports.as_ref(), &path, &entry.span, false, notes);
            if let Some(expires) = entry
                .expires
                .as_ref()
                .filter(|expires| expires.value <= now)
            {
                let message = format!("`{path}` has expired: it grants nothing any more");
                notes.warning(&expires.span, message, "renew it, or remove the entry");
            }
            grant(index, entry, &path, ports, notes)
        })
        .collect()
}

/// The denials of a list called `list`, without the wrong ones.
pub(super) fn denials(
    documents: &[GrantDocument],
    list: &str,
    notes: &mut Notes<'_>,
) -> Vec<Grant> {
    let entries = documents.iter().enumerate();
    entries
        .filter_map(|(index, entry)| {
            let path = format!("{list}[{index}]");
            let ports = match &entry.ports {
                Some(written) => ports(Some(written), &path, &entry.span, false, notes),
                None => Some(Ports::all()),
            };
            grant(index, entry, &path, ports, notes)
        })
        .collect()
}

fn grant(
    index: usize,
    entry: &GrantDocument,
    path: &str,
    ports: Option<Ports>,
    notes: &mut Notes<'_>,
) -> Option<Grant> {
    let Some(to) = &entry.to else {
        let help = "write `to = \"ADDRESS\"`, a network, a name, or a set as \"@NAME\"";
        notes.missing(
            &format!("{path}.to"),
            &entry.span,
            format!("`{path}.to` is missing"),
            help,
        );
        return None;
    };
    let destination = notes.parsed(&to.span, to.value.parse::<Destination>(), |e| e.help());
    let within = within(entry, destination.as_ref(), path, notes);
    let target = match destination? {
        Destination::Net(cidr) => Target::Net(cidr),
        Destination::Set(name) => Target::Set(name),
        Destination::Host(host) => Target::Name(host),
    };
    Some(Grant {
        index,
        to: target,
        ports: ports?,
        reason: entry.reason.as_ref().map(|at| at.value.clone()),
        expires: entry.expires.as_ref().map(|at| at.value),
        within,
        span: to.span.clone(),
    })
}

fn within(
    entry: &GrantDocument,
    destination: Option<&Destination>,
    path: &str,
    notes: &mut Notes<'_>,
) -> Vec<At<Cidr>> {
    let Some(list) = &entry.within else {
        return Vec::new();
    };
    if !matches!(destination, None | Some(Destination::Host(_))) {
        let message = format!("`{path}.within` has no meaning without a name in `to`");
        notes.error(
            &list.span,
            message,
            "remove it: an address is its own limit",
        );
    }
    let parsed = list.value.iter().filter_map(|each| {
        let value = notes.parsed(&each.span, each.value.parse::<Cidr>(), |e| e.help())?;
        let span = each.span.clone();
        Some(At { value, span })
    });
    parsed.collect()
}

/// The ports of an entry; `local` ones are a server's. None when some are wrong: the entry would
/// say something else without them.
fn ports(
    written: Option<&At<Vec<At<PortDocument>>>>,
    path: &str,
    entry: &Span,
    local: bool,
    notes: &mut Notes<'_>,
) -> Option<Ports> {
    let key = format!("{path}.ports");
    let Some(list) = written else {
        let help = "write `ports = [443]`; \"any\" is every port of every protocol";
        notes.missing(&key, entry, format!("`{key}` is missing"), help);
        return None;
    };
    if list.value.is_empty() {
        // Elements of a wrong type have their own finding and are not in the list.
        let help = "write the ports, such as `ports = [443, \"53/udp\"]`, or remove the entry";
        notes.missing(&key, &list.span, format!("`{key}` is empty"), help);
        return None;
    }
    let mut specs = Vec::with_capacity(list.value.len());
    let mut whole = true;
    for each in &list.value {
        let parsed = match &each.value {
            PortDocument::Number(number) => PortSpec::tcp(*number),
            PortDocument::Text(text) => text.parse(),
        };
        let spec = notes.parsed(&each.span, parsed, |error| error.help());
        if local
            && let Some(class) = spec.as_ref().and_then(PortSpec::class)
            && !class.has_ports()
        {
            let message = format!("{} has no ports to serve", class.name());
            notes.error(&each.span, message, "a served port is TCP or UDP");
            whole = false;
        }
        whole &= spec.is_some();
        specs.extend(spec);
    }
    let ports: Ports = specs.into_iter().collect();
    whole.then(|| {
        if local {
            ports.with_ports_only()
        } else {
            ports
        }
    })
}
