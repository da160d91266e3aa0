//! The control socket: HTTP/JSON on a unix socket, for the command line and for whoever speaks
//! `curl --unix-socket`. Who may ask what is decided by what the kernel says of the peer.

pub mod protocol;
