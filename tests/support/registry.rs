//! Registry entries, written as people write them.

use std::fmt::Write as _;

/// An agent's entry in the making. The default is active, approved, in force until 2099, with
/// no grants.
#[derive(Clone, Debug)]
pub struct Agent {
    /// `agent.id`.
    pub id: String,
    state: &'static str,
    approval_ref: String,
    not_before: Option<String>,
    expires: String,
    mode: &'static str,
    loopback: &'static str,
    selectors: Vec<String>,
    scope: String,
}

impl Agent {
    /// An agent that claims `/ROOT/ID.service`.
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            state: "active",
            approval_ref: "CHG-1".to_owned(),
            not_before: None,
            expires: "2099-01-01T00:00:00Z".to_owned(),
            mode: "enforce",
            loopback: "own",
            selectors: Vec::new(),
            scope: String::new(),
        }
    }

    /// The standard one: the in-scope networks of both families, on TCP and UDP 443 and ICMP.
    pub fn standard(id: &str) -> Self {
        Self::new(id)
            .allow("198.51.100.0/24", r#"443, "443/udp", "icmp""#)
            .allow("2001:db8:1::/64", r#"443, "443/udp", "icmp""#)
    }

    /// `lifecycle.state`.
    pub fn state(mut self, state: &'static str) -> Self {
        self.state = state;
        self
    }

    /// `lifecycle.approval_ref`.
    pub fn approval(mut self, reference: &str) -> Self {
        self.approval_ref = reference.to_owned();
        self
    }

    /// `lifecycle.not_before`.
    pub fn not_before(mut self, time: String) -> Self {
        self.not_before = Some(time);
        self
    }

    /// `lifecycle.expires`.
    pub fn expires(mut self, time: String) -> Self {
        self.expires = time;
        self
    }

    /// `scope.mode = "monitor"`.
    pub fn monitor(mut self) -> Self {
        self.mode = "monitor";
        self
    }

    /// `scope.loopback`.
    pub fn loopback(mut self, loopback: &'static str) -> Self {
        self.loopback = loopback;
        self
    }

    /// One more selector; with none, the agent claims its service.
    pub fn selector(mut self, glob: &str) -> Self {
        self.selectors.push(glob.to_owned());
        self
    }

    /// A grant; `ports` is the inside of the TOML list.
    pub fn allow(self, to: &str, ports: &str) -> Self {
        self.entry(&format!(
            "[[scope.allow]]\nto = \"{to}\"\nports = [{ports}]\n"
        ))
    }

    /// A grant with an end.
    pub fn allow_until(self, to: &str, ports: &str, time: &str) -> Self {
        self.entry(&format!(
            "[[scope.allow]]\nto = \"{to}\"\nports = [{ports}]\nexpires = {time}\n"
        ))
    }

    /// A denial of all ports.
    pub fn deny(self, to: &str) -> Self {
        self.entry(&format!("[[scope.deny]]\nto = \"{to}\"\n"))
    }

    /// Clients to answer.
    pub fn serve(self, ports: &str, from: &str) -> Self {
        self.entry(&format!(
            "[[scope.serve]]\nports = [{ports}]\nfrom = [{from}]\n"
        ))
    }

    /// Raw TOML at the end.
    pub fn entry(mut self, toml: &str) -> Self {
        self.scope.push_str(toml);
        self
    }

    /// The file, for an agent below `root`.
    pub fn toml(&self, root: &str) -> String {
        let selectors = if self.selectors.is_empty() {
            vec![format!("{root}/{}.service", self.id)]
        } else {
            self.selectors.clone()
        };
        let mut text = format!(
            "schema = 1\n[agent]\nid = \"{id}\"\nname = \"Agent {id}\"\n\
             purpose = \"Test\"\nowner = \"alice@example.com\"\n\
             [lifecycle]\nstate = \"{state}\"\napproved_by = \"dave@example.com\"\n\
             approval_ref = \"{approval_ref}\"\nexpires = {expires}\n",
            id = self.id,
            state = self.state,
            approval_ref = self.approval_ref,
            expires = self.expires,
        );
        if let Some(time) = &self.not_before {
            // A String takes all that is written to it.
            let _ = writeln!(text, "not_before = {time}");
        }
        // The selector comes last: without it nothing is an entry, so no torn file is one.
        let _ = write!(
            text,
            "[scope]\nmode = \"{}\"\nloopback = \"{}\"\n{}[selector]\ncgroup = {selectors:?}\n",
            self.mode, self.loopback, self.scope
        );
        text
    }
}
