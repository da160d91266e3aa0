//! What an agent that was refused something is to do, in sentences that a program or a model can act
//! on: `denials[].advice` of `GET /v1/self`.

use agent_ebpf::abi::Reason;

use crate::audit::Violation;

/// What an agent is to do about a refusal.
pub fn on(violation: &Violation) -> String {
    let agent = &violation.agent;
    let whom = match agent.owner.as_str() {
        "" => "whoever runs this host".to_owned(),
        owner => owner.to_owned(),
    };
    let approval = agent.approval_ref.as_ref();
    let approval = approval.map_or_else(String::new, |reference| {
        format!(" (approval reference {reference})")
    });
    let ask = format!("ask {whom}{approval}");
    match violation.reason {
        Reason::OutOfScope | Reason::NameNotInScope | Reason::SocketType => format!(
            "Do not retry and look for no other way: this is outside your scope. If the task needs \
             it, {ask} to grant it, and name the destination, the port and the purpose."
        ),
        Reason::Denied | Reason::Floor => format!(
            "Do not retry and look for no other way: this is denied on purpose. If you believe that \
             to be a mistake, {ask}."
        ),
        Reason::Expired | Reason::NotYetValid => format!(
            "Do not retry before that changes: the registration or the grant is not valid now; {ask}."
        ),
        Reason::LeaseExpired => {
            "Resolve the name again, then connect to an address of the new answer.".to_owned()
        }
        Reason::LoopbackForeign => format!(
            "Do not retry: the service on this host is not your own; {ask} to grant its address and \
             port."
        ),
        Reason::Draft | Reason::Suspended | Reason::Revoked | Reason::Unregistered => {
            format!("Stop: nothing can be reached now, whatever the destination; {ask}.")
        }
        Reason::Translated | Reason::UnixNotInScope | Reason::Containment | Reason::Fault => {
            format!(
                "Do not retry; {ask}, and pass on the reason `{}`.",
                violation.reason.name()
            )
        }
    }
}
