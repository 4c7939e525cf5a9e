//! `meshbench`: measures mesh-wg beside other userspace WireGuard devices. See `docs/bench.md`.

mod bars;
mod cli;
mod generate;
mod idle;
mod iperf;
mod lab;
mod measure;
mod metric;
mod ping;
mod plot;
mod proc;
mod program;
mod results;
mod rounds;
mod stop;
mod suites;
mod table;

fn main() -> std::process::ExitCode {
    cli::main()
}
