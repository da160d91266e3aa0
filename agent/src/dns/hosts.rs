//! The addresses of a host for the daemon itself, which asks in its own name and not for an agent:
//! nothing is granted by them. The resolvers are the guard's.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{
        DNSClass, Name, RData, RecordType,
        rdata::{A, AAAA},
    },
};

use super::{
    name::wire,
    resolv::{self, Watched},
    server::Source,
    upstream,
};

/// Names that a chain of CNAMEs may have.
const MAX_CHAIN: usize = 16;
/// Addresses of one name and family that are taken.
const MAX_ADDRESSES: usize = 64;

/// Whom to ask, as the settings say.
#[derive(Debug)]
pub struct Resolvers {
    sources: Vec<Source>,
    files: Vec<Watched>,
}

// === impl Resolvers ===

impl Resolvers {
    /// Those of `sources`; files are read again when they change.
    pub fn new(sources: Vec<Source>) -> Self {
        let files = sources.iter().filter_map(|source| match source {
            Source::File(path) => Some(Watched::new(path)),
            Source::At(_) => None,
        });
        Self {
            files: files.collect(),
            sources,
        }
    }

    /// Their addresses now. A file that cannot be read says what it said last.
    pub fn servers(&mut self) -> Vec<SocketAddr> {
        let mut files = self.files.iter_mut();
        let mut servers = Vec::new();
        for source in &self.sources {
            match source {
                Source::At(at) => servers.push(*at),
                Source::File(_) => {
                    let read = files.next().map(|file| file.read().0);
                    servers.extend(read.unwrap_or_else(|| resolv::Resolv::parse("")).servers);
                }
            }
        }
        servers
    }
}

/// The IPv4 and IPv6 addresses of `host` (lower case, A-labels, no trailing dot), as far as
/// `servers` have any.
///
/// # Errors
/// Why there is none, in words.
pub async fn addresses(servers: &[SocketAddr], host: &str) -> Result<BTreeSet<IpAddr>, String> {
    let name = wire(host).ok_or_else(|| "is no host name".to_owned())?;
    let (v4, v6) = tokio::join!(
        upstream::ask(servers, &name, RecordType::A),
        upstream::ask(servers, &name, RecordType::AAAA)
    );
    let mut found = BTreeSet::new();
    let mut why = None;
    for (answer, kind) in [(v4, RecordType::A), (v6, RecordType::AAAA)] {
        match answer {
            Ok(message) if message.metadata.response_code == ResponseCode::NXDomain => {
                why.get_or_insert_with(|| "there is no such name".to_owned());
            }
            Ok(message) => found.extend(of(&message, &name, kind).take(MAX_ADDRESSES)),
            Err(error) => drop(why.insert(error)),
        }
    }
    if found.is_empty() {
        return Err(why.unwrap_or_else(|| "it has no address".to_owned()));
    }
    Ok(found)
}

/// The addresses of the name that was asked, or of what it is an alias of.
fn of<'m>(
    message: &'m Message,
    name: &Name,
    kind: RecordType,
) -> impl Iterator<Item = IpAddr> + 'm {
    let mut end = name.clone();
    for _ in 0..MAX_CHAIN {
        let next = message
            .answers
            .iter()
            .find_map(|record| match &record.data {
                RData::CNAME(target) if record.name.eq_ignore_root(&end) => Some(target.0.clone()),
                _ => None,
            });
        match next {
            Some(next) => end = next,
            None => break,
        }
    }
    message.answers.iter().filter_map(move |record| {
        let of_it = record.dns_class == DNSClass::IN && record.name.eq_ignore_root(&end);
        match &record.data {
            RData::A(A(addr)) if of_it && kind == RecordType::A => Some((*addr).into()),
            RData::AAAA(AAAA(addr)) if of_it && kind == RecordType::AAAA => Some((*addr).into()),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::{Record, rdata::CNAME};

    use super::*;

    fn name(text: &str) -> Name {
        wire(text).unwrap()
    }

    #[test]
    fn only_what_the_name_leads_to_counts() {
        let mut message = Message::query();
        let records = [
            ("api.test", RData::CNAME(CNAME(name("edge.test")))),
            ("edge.test", RData::A(A([192, 0, 2, 1].into()))),
            ("other.test", RData::A(A([192, 0, 2, 9].into()))),
        ];
        let records = records.map(|(owner, data)| Record::from_rdata(name(owner), 60, data));
        message.add_answers(records);
        let found: Vec<IpAddr> = of(&message, &name("api.test"), RecordType::A).collect();
        assert_eq!(found, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            of(&message, &name("api.test"), RecordType::AAAA).count(),
            0,
            "of the type that was asked for"
        );
        let mut circle = Message::query();
        circle.add_answers([Record::from_rdata(
            name("api.test"),
            60,
            RData::CNAME(CNAME(name("api.test"))),
        )]);
        assert_eq!(of(&circle, &name("api.test"), RecordType::A).count(), 0);
    }
}
