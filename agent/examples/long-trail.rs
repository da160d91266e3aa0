//! Writes an audit trail of so many records, for `remit log verify` to be measured by: chained and
//! signed as the daemon does it, but without the head that it keeps beside each record.
//!
//! ```console
//! $ cargo run --release -p remit --example long-trail -- FOLDER 10000000
//! ```

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use remit::audit::{
    Decided, Decision, Host, LogName,
    trail::{
        chain::{self, Link, Position},
        checkpoint::Checkpoint,
        event::TrailEvent,
        keys::Signer,
    },
};
use serde_json::{Map, Value};

/// A checkpoint is signed so often, as by the daemon.
const SIGNED_EVERY: u64 = 256;
const START: i64 = 1_793_836_800_000;

struct Writer {
    out: BufWriter<File>,
    chain: String,
    last: Option<Position>,
}

impl Writer {
    fn put(&mut self, event: Map<String, Value>) -> Result<()> {
        let link = Link {
            chain: &self.chain,
            authority: "long-trail/remit",
            after: self.last,
        };
        let sealed = chain::seal(event, &link);
        self.last = Some(sealed.position);
        self.out.write_all(&sealed.line)?;
        Ok(())
    }

    fn records(&self) -> u64 {
        self.last.map_or(0, |last| last.record)
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let usage = "usage: long-trail FOLDER COUNT";
    let folder = PathBuf::from(arguments.next().context(usage)?);
    let count = arguments.next().context(usage)?;
    let count: u64 = count.to_string_lossy().parse().context(usage)?;
    fs::create_dir_all(&folder)?;
    let host = Host::read();
    let signer = Signer::random()?;
    let mut writer = Writer {
        out: BufWriter::with_capacity(1 << 20, File::create(folder.join(LogName::Audit.file()))?),
        chain: "0123456789abcdef0123456789abcdef".to_owned(),
        last: None,
    };
    let begun = TrailEvent::Begun {
        key: signer.public(),
    };
    writer.put(begun.to_ocsf(&host, 1, START, 0))?;
    let mut checkpoint = 0;
    while writer.records() < count {
        let record = writer.records() + 1;
        let now = START + i64::try_from(record)?;
        let last = writer.last.context("no record")?;
        if record.is_multiple_of(SIGNED_EVERY) || record == count {
            checkpoint += 1;
            let signed = Checkpoint::sign(&signer, &writer.chain, checkpoint, last, now);
            writer.put(TrailEvent::Checkpoint(signed).to_ocsf(&host, record, now, record))?;
            continue;
        }
        let decided = Decided {
            time: now,
            what: Decision::Loaded {
                revision: record,
                agents: 3,
                warnings: Vec::new(),
                closed: 0,
            },
        };
        if let Value::Object(event) = decided.to_ocsf(&host, record) {
            writer.put(event)?;
        }
    }
    writer.out.flush()?;
    let key = signer.public().to_pem().context("no PEM")?;
    fs::write(folder.join("key.pem"), key)?;
    let last = writer.last.context("no record")?;
    println!("{} records, head {}", last.record, last.hash);
    Ok(())
}
