//! What the guard accepts of DNS messages, and what it writes. Pure.
//!
//! A question is taken apart here, and only its parts go on: nothing of the bytes that an agent
//! sent reaches an upstream, neither its id nor the case of its letters nor its options. Answers
//! are rebuilt in the same way.

use hickory_proto::{
    op::{Edns, Header, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, Record, RecordType, rdata::opt::EdnsOption},
    serialize::binary::{BinDecodable as _, BinDecoder, BinEncodable as _, BinEncoder},
};
use thiserror::Error;

use super::name::canonical;

/// The longest message over UDP that is read or written; more goes over TCP.
pub const MAX_UDP: u16 = 4096;
/// What an upstream may send over UDP: more would be cut into fragments on its way (DNS flag day
/// 2020), which can be spoofed.
pub const UPSTREAM_UDP: u16 = 1232;
/// Octets of an Extended DNS Error's text.
const MAX_TEXT: usize = 200;
/// Extended DNS Error (RFC 8914).
const EDE: u16 = 15;
/// Records of an answer that are looked at: a message of 64 KiB has room for more than 4,000.
const MAX_RECORDS: u16 = 2048;

/// INFO-CODE of an Extended DNS Error (RFC 8914, section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ErrorCode {
    /// The guard is starting or stopping.
    NotReady = 14,
    /// The policy of the host closes it.
    Blocked = 15,
    /// Whoever asks may not.
    Prohibited = 18,
    /// No upstream could be reached.
    NoReachableAuthority = 22,
    /// An upstream's answer made no sense.
    InvalidData = 24,
}

/// A question, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The message's id, for the reply.
    pub id: u16,
    /// The name as it was written, for the reply.
    pub name: Name,
    /// The name as the scope knows it; none for what is no host name.
    pub host: Option<String>,
    /// The type asked for.
    pub kind: RecordType,
    /// The class asked for.
    pub class: DNSClass,
    /// Octets that a reply over UDP may have; none where the question has no EDNS.
    pub payload: Option<u16>,
    /// The bits that a reply repeats.
    pub recursion_desired: bool,
    /// The bits that a reply repeats.
    pub checking_disabled: bool,
}

/// A message that is no question to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// No reply can or should be made to it.
    Silent(&'static str),
    /// It is answered with an error.
    Reply {
        /// What is wrong with it.
        why: &'static str,
        /// The answer.
        reply: Vec<u8>,
    },
}

/// An upstream's answer that is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Mismatch {
    /// It can't be read.
    #[error("it is no DNS message")]
    Malformed,
    /// It is not about what was asked.
    #[error("it is not an answer to this question")]
    Other,
    /// It is, but for the case of letters: a guess, or a server that does not keep it.
    #[error("it does not keep the case of the question's letters")]
    Case,
}

/// Reads what an agent sent.
///
/// # Errors
/// When it is no question that can be looked at.
pub fn read(bytes: &[u8]) -> Result<Asked, Unreadable> {
    let mut decoder = BinDecoder::new(bytes);
    let Ok(header) = Header::read(&mut decoder) else {
        return Err(Unreadable::Silent("shorter than a header"));
    };
    if header.message_type == MessageType::Response {
        return Err(Unreadable::Silent("a response"));
    }
    let error = |why, code| {
        let reply = bare(header.id, header.op_code, code);
        Err(Unreadable::Reply { why, reply })
    };
    if header.op_code != OpCode::Query {
        return error("not a query", ResponseCode::NotImp);
    }
    // Looked at before anything is allocated: the parser trusts these counts.
    let counts = header.counts;
    if counts.queries != 1 {
        return error("not one question", ResponseCode::FormErr);
    }
    if counts.answers != 0 || counts.authorities != 0 || counts.additionals > 2 {
        return error("a question with answers", ResponseCode::FormErr);
    }
    let Ok(message) = Message::from_vec(bytes) else {
        return error("malformed", ResponseCode::FormErr);
    };
    let Some(query) = message.queries.first() else {
        return error("not one question", ResponseCode::FormErr);
    };
    if message
        .edns
        .as_ref()
        .is_some_and(|edns| edns.version() != 0)
    {
        return error("an EDNS version that is not there", ResponseCode::BADVERS);
    }
    Ok(Asked {
        id: header.id,
        name: query.name().clone(),
        host: canonical(query.name()),
        kind: query.query_type(),
        class: query.query_class(),
        payload: message.edns.as_ref().map(Edns::max_payload),
        recursion_desired: header.recursion_desired,
        checking_disabled: header.checking_disabled,
    })
}

/// A question to an upstream: `name` with the case of its letters as the caller wants it, no option
/// but the size of the answer.
///
/// # Errors
/// When it can't be written, which no name that was read makes happen.
pub fn question(id: u16, name: &Name, kind: RecordType) -> Result<Vec<u8>, Mismatch> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.clone(), kind));
    let mut edns = Edns::new();
    edns.set_max_payload(UPSTREAM_UDP);
    message.set_edns(edns);
    message.to_vec().map_err(|_error| Mismatch::Malformed)
}

/// Reads an upstream's answer to the question with this id, name and type. The case of letters
/// counts only with `exact`: over TCP nobody can guess.
///
/// # Errors
/// When it is another's answer, or none.
pub fn answer(
    bytes: &[u8],
    id: u16,
    name: &Name,
    kind: RecordType,
    exact: bool,
) -> Result<Message, Mismatch> {
    let header = Header::read(&mut BinDecoder::new(bytes)).map_err(|_error| Mismatch::Malformed)?;
    if header.id != id
        || header.message_type != MessageType::Response
        || header.op_code != OpCode::Query
    {
        return Err(Mismatch::Other);
    }
    let counts = header.counts;
    let records = [counts.answers, counts.authorities, counts.additionals];
    if counts.queries != 1 || records.iter().any(|count| *count > MAX_RECORDS) {
        return Err(Mismatch::Malformed);
    }
    let message = Message::from_vec(bytes).map_err(|_error| Mismatch::Malformed)?;
    let query = message.queries.first().ok_or(Mismatch::Malformed)?;
    let same = query.name().eq_ignore_root(name)
        && query.query_type() == kind
        && query.query_class() == DNSClass::IN;
    if !same {
        return Err(Mismatch::Other);
    }
    if exact && !query.name().eq_ignore_root_case(name) {
        return Err(Mismatch::Case);
    }
    Ok(message)
}

/// A reply under way.
#[derive(Clone, Debug)]
pub struct Reply(Message);

// === impl Reply ===

impl Reply {
    /// A reply to `asked` with nothing in it.
    pub fn to(asked: &Asked, code: ResponseCode) -> Self {
        let mut message = Message::response(asked.id, OpCode::Query);
        message.metadata.recursion_desired = asked.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.checking_disabled = asked.checking_disabled;
        message.metadata.response_code = code;
        let mut query = Query::query(asked.name.clone(), asked.kind);
        query.set_query_class(asked.class);
        message.add_query(query);
        // No OPT to who sent none (RFC 6891, section 7).
        if asked.payload.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(MAX_UDP);
            message.set_edns(edns);
        }
        Self(message)
    }

    /// Says why in words, to who can read it.
    #[must_use]
    pub fn because(mut self, code: ErrorCode, text: &str) -> Self {
        if let Some(edns) = &mut self.0.edns {
            let mut data = (code as u16).to_be_bytes().to_vec();
            let mut end = text.len().min(MAX_TEXT);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            data.extend_from_slice(text.get(..end).unwrap_or_default().as_bytes());
            edns.options_mut().insert(EdnsOption::Unknown(EDE, data));
        }
        self
    }

    /// What came of the question.
    pub fn code(&self) -> ResponseCode {
        self.0.metadata.response_code
    }

    /// Adds records of the answer.
    #[must_use]
    pub fn answers(mut self, records: Vec<Record>) -> Self {
        self.0.add_answers(records);
        self
    }

    /// Adds the record that says how long nothing is there.
    #[must_use]
    pub fn authority(mut self, record: Option<Record>) -> Self {
        self.0.authorities.extend(record);
        self
    }

    /// The message in at most `limit` octets; what does not fit is left out, and the message says
    /// that it was cut, so that the agent asks again over TCP.
    pub fn bytes(&self, limit: u16) -> Vec<u8> {
        let fits = |message: &Message| {
            let mut bytes = Vec::with_capacity(512);
            let mut encoder = BinEncoder::new(&mut bytes);
            encoder.set_max_size(limit);
            let written = message.emit(&mut encoder).is_ok();
            (written && bytes.len() <= usize::from(limit)).then_some(bytes)
        };
        let cut = || {
            let mut cut = self.0.truncate();
            if let Some(edns) = &mut cut.edns {
                edns.options_mut().remove(EDE.into());
            }
            cut
        };
        // The encoder leaves records out by itself, and says so, but cuts an RRset in two: a whole
        // answer or none.
        match fits(&self.0) {
            Some(bytes) if !is_truncated(&bytes) => bytes,
            _ => fits(&cut()).unwrap_or_default(),
        }
    }
}

fn is_truncated(bytes: &[u8]) -> bool {
    bytes.get(2).is_some_and(|flags| flags & 0x02 != 0)
}

/// Octets that a reply over UDP may have.
pub fn udp_limit(asked: &Asked) -> u16 {
    asked.payload.unwrap_or(512).clamp(512, MAX_UDP)
}

/// An error to a message of which nothing but the header is known.
fn bare(id: u16, op_code: OpCode, code: ResponseCode) -> Vec<u8> {
    let mut message = Message::error_msg(id, op_code, code);
    if code.high() > 0 {
        message.set_edns(Edns::new());
    }
    message.to_vec().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::rr::{RData, rdata::A};

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn ask(text: &str, kind: RecordType, payload: Option<u16>) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(name(text), kind));
        if let Some(payload) = payload {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            message.set_edns(edns);
        }
        message.to_vec().unwrap()
    }

    fn code(bytes: &[u8]) -> ResponseCode {
        Message::from_vec(bytes).unwrap().metadata.response_code
    }

    #[test]
    fn a_question_is_taken_apart() {
        let asked = read(&ask("aPi.Example.com.", RecordType::AAAA, Some(1400))).unwrap();
        assert_eq!(asked.id, 7);
        assert_eq!(asked.host.as_deref(), Some("api.example.com"));
        assert_eq!((asked.kind, asked.class), (RecordType::AAAA, DNSClass::IN));
        assert_eq!(asked.payload, Some(1400));
        assert_eq!(udp_limit(&asked), 1400);
        let plain = read(&ask("a.", RecordType::A, None)).unwrap();
        assert_eq!((plain.payload, udp_limit(&plain)), (None, 512));
    }

    #[test]
    fn what_is_no_question_is_not_looked_at() {
        let silent = |bytes: &[u8]| matches!(read(bytes), Err(Unreadable::Silent(_)));
        let error = |bytes: &[u8]| match read(bytes) {
            Err(Unreadable::Reply { reply, .. }) => code(&reply),
            other => panic!("{other:?}"),
        };
        let good = ask("a.example.", RecordType::A, Some(1232));
        assert!(silent(&[]));
        assert!(silent(&good[..11]));
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        // A response, another opcode, two questions, none, an answer, many additional records.
        assert!(silent(&with(2, 0x81)));
        assert_eq!(error(&with(2, 0x29)), ResponseCode::NotImp);
        for bytes in [
            with(5, 2),
            with(5, 0),
            with(4, 0xff),
            with(7, 1),
            with(9, 1),
            with(10, 9),
        ] {
            assert_eq!(error(&bytes), ResponseCode::FormErr);
        }
        assert_eq!(error(&good[..20]), ResponseCode::FormErr);
        // EDNS version 1.
        let mut version = good.clone();
        let at = version.len() - 5;
        version[at] = 1;
        // The parser knows 16 by its other name.
        assert_eq!(u16::from(error(&version)), u16::from(ResponseCode::BADVERS));
    }

    #[test]
    fn a_question_to_an_upstream_has_nothing_of_the_agents_bytes() {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(name("SeCrEt.example."), RecordType::A));
        let mut edns = Edns::new();
        edns.options_mut()
            .insert(EdnsOption::Unknown(65_001, b"exfiltrated".to_vec()));
        message.set_edns(edns);
        message.metadata.checking_disabled = true;
        let asked = read(&message.to_vec().unwrap()).unwrap();
        let rebuilt = super::super::name::wire(asked.host.as_deref().unwrap()).unwrap();
        let bytes = question(99, &rebuilt, asked.kind).unwrap();
        let sent = Message::from_vec(&bytes).unwrap();
        assert_eq!(sent.metadata.id, 99);
        assert!(!sent.metadata.checking_disabled);
        assert_eq!(sent.queries[0].name().to_ascii(), "secret.example.");
        assert!(sent.edns.unwrap().options().as_ref().is_empty());
    }

    #[test]
    fn only_the_answer_to_the_question_is_taken() {
        let asked = name("aPi.example.");
        let reply = |id, text: &str, kind| {
            let mut message = Message::response(id, OpCode::Query);
            message.add_query(Query::query(name(text), kind));
            message.to_vec().unwrap()
        };
        let take =
            |bytes: &[u8], exact| answer(bytes, 9, &asked, RecordType::A, exact).map(|_message| ());
        let good = reply(9, "aPi.example.", RecordType::A);
        assert_eq!(take(&good, true), Ok(()));
        assert_eq!(
            take(&reply(8, "aPi.example.", RecordType::A), true),
            Err(Mismatch::Other)
        );
        assert_eq!(
            take(&reply(9, "api.example.", RecordType::A), true),
            Err(Mismatch::Case)
        );
        assert_eq!(
            take(&reply(9, "api.example.", RecordType::A), false),
            Ok(())
        );
        assert_eq!(
            take(&reply(9, "b.example.", RecordType::A), false),
            Err(Mismatch::Other)
        );
        assert_eq!(
            take(&reply(9, "aPi.example.", RecordType::TXT), true),
            Err(Mismatch::Other)
        );
        assert_eq!(
            take(&ask("aPi.example.", RecordType::A, None), true),
            Err(Mismatch::Other)
        );
        assert_eq!(take(&good[..15], true), Err(Mismatch::Malformed));
        let mut many = good.clone();
        many[6] = 0xff;
        assert_eq!(take(&many, true), Err(Mismatch::Malformed));
    }

    #[test]
    fn a_refusal_says_why_to_who_can_read_it() {
        let text = "agent a may not resolve b.example; ask alice@example.com";
        for payload in [None, Some(1232)] {
            let asked = read(&ask("B.example.", RecordType::A, payload)).unwrap();
            let bytes = Reply::to(&asked, ResponseCode::Refused)
                .because(ErrorCode::Prohibited, text)
                .bytes(512);
            let reply = Message::from_vec(&bytes).unwrap();
            assert_eq!(reply.metadata.id, 7);
            assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
            // The case of the question comes back: 0x20.
            assert_eq!(reply.queries[0].name().to_ascii(), "B.example.");
            let said = reply.edns.and_then(|edns| match edns.option(EDE.into()) {
                Some(EdnsOption::Unknown(_, data)) => Some(data.clone()),
                _ => None,
            });
            let expected = [&18_u16.to_be_bytes()[..], text.as_bytes()].concat();
            assert_eq!(said, payload.map(|_| expected));
        }
    }

    #[test]
    fn an_answer_that_does_not_fit_is_cut_as_a_whole() {
        let asked = read(&ask("a.example.", RecordType::A, None)).unwrap();
        let records = |count: u8| -> Vec<Record> {
            (0..count)
                .map(|last| {
                    let addr = Ipv4Addr::new(203, 0, 113, last);
                    Record::from_rdata(name("a.example."), 60, RData::A(A(addr)))
                })
                .collect()
        };
        let small = Reply::to(&asked, ResponseCode::NoError)
            .answers(records(3))
            .bytes(512);
        assert_eq!(Message::from_vec(&small).unwrap().answers.len(), 3);
        let reply = Reply::to(&asked, ResponseCode::NoError).answers(records(200));
        let cut = reply.bytes(512);
        let message = Message::from_vec(&cut).unwrap();
        assert!(cut.len() <= 512 && message.metadata.truncation);
        assert!(message.answers.is_empty());
        let whole = Message::from_vec(&reply.bytes(u16::MAX)).unwrap();
        assert_eq!(
            (whole.answers.len(), whole.metadata.truncation),
            (200, false)
        );
    }

    #[test]
    fn long_texts_end_at_a_character() {
        let asked = read(&ask("a.", RecordType::A, Some(4096))).unwrap();
        let text = "ü".repeat(150);
        let bytes = Reply::to(&asked, ResponseCode::Refused)
            .because(ErrorCode::Blocked, &text)
            .bytes(4096);
        let reply = Message::from_vec(&bytes).unwrap();
        let Some(EdnsOption::Unknown(_, data)) = reply.edns.unwrap().option(EDE.into()).cloned()
        else {
            panic!("no text");
        };
        assert_eq!(std::str::from_utf8(&data[2..]).unwrap(), "ü".repeat(100));
    }
}
