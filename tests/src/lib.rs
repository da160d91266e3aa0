//! Host, VM and end-to-end tests of Remit.
