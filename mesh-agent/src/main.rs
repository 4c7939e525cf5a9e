//! The `mesh-agent` program.

use std::process::ExitCode;

use clap::Parser as _;
use mesh_agent::cli::Cli;
use mesh_agent::commands;

fn main() -> ExitCode {
    match commands::execute(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
