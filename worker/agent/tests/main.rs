//! The agent from outside: real sockets, real processes, a real gRPC server.

mod collective;
mod coordinator;
mod session;
mod supervisor;
mod worker;
