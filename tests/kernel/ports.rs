//! A grant is for its ports and protocols, to the number.

use crate::{
    harness::Case,
    support::{
        Agent, Family, Fixture, Refusal, Way,
        network::{IN_V4, IN_V6},
    },
};

/// Way, port, whether it arrives; under `443, "8000-8100", "53/udp", "600-610/udp"`.
const TABLE: &[(Way, u16, bool)] = &[
    (Way::Tcp, 443, true),
    (Way::UdpSendTo, 443, false),
    (Way::UdpConnected, 443, false),
    (Way::Tcp, 442, false),
    (Way::Tcp, 444, false),
    (Way::UdpSendTo, 53, true),
    (Way::UdpConnected, 53, true),
    (Way::Tcp, 53, false),
    (Way::Tcp, 7999, false),
    (Way::Tcp, 8000, true),
    (Way::Tcp, 8050, true),
    (Way::Tcp, 8100, true),
    (Way::Tcp, 8101, false),
    (Way::UdpSendTo, 8050, false),
    (Way::UdpSendTo, 599, false),
    (Way::UdpSendTo, 600, true),
    (Way::UdpSendTo, 610, true),
    (Way::UdpSendTo, 611, false),
];

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Family::ALL
        .into_iter()
        .map(|family| {
            Case::new(format!("ports::{}_are_exact", family.name()), move |ctx| {
                let ports = r#"443, "8000-8100", "53/udp", "600-610/udp""#;
                let agent = Agent::new("alpha").allow(IN_V4, ports).allow(IN_V6, ports);
                let mut fx = Fixture::start(ctx, &[agent])?;
                let mut actor = fx.actor("alpha")?;
                for (way, port, arrives) in TABLE {
                    let to = family.pick(IN_V4, IN_V6, *port)?;
                    if *arrives {
                        fx.arrives(&mut actor, *way, family, to)?;
                    } else {
                        let how = Refusal::of("alpha", "out_of_scope").without_control();
                        fx.refused(&mut actor, *way, family, to, &how)?;
                    }
                }
                fx.reconcile("alpha")
            })
        })
        .collect();
    cases.push(Case::new("ports::any_tcp_is_not_udp", |ctx| {
        let agent = Agent::new("alpha").allow("198.51.100.0/24", "\"any/tcp\"");
        let mut fx = Fixture::start(ctx, &[agent])?;
        let mut actor = fx.actor("alpha")?;
        let how = Refusal::of("alpha", "out_of_scope");
        for port in [1, 443, 65_535] {
            let to = Family::V4.pick(IN_V4, IN_V6, port)?;
            fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
            fx.refused(&mut actor, Way::UdpSendTo, Family::V4, to, &how)?;
        }
        fx.refused(
            &mut actor,
            Way::Ping,
            Family::V4,
            Family::V4.pick(IN_V4, IN_V6, 0)?,
            &how,
        )?;
        fx.reconcile("alpha")
    }));
    cases
}
