//! `context-parallel`: see it work (`demo`), what is here (`info`), what would happen (`plan`), how fast (`perf`), which
//! samples run where (`schedule`).

mod args;
mod check;
mod compare;
mod cost;
mod demo;
mod info;
mod json;
mod launch;
mod mesh;
mod oracle;
mod perf;
mod place;
mod plan;
mod probe;
mod rank;
mod report;
mod row;
mod schedule;
mod shape;
mod source;
mod text;

use args::{Command, Failure, usage};
use std::process::ExitCode;

/// The commands that a user calls, in the order of the help.
const COMMANDS: [&Command; 5] =
    [&demo::COMMAND, &info::COMMAND, &plan::COMMAND, &perf::COMMAND, &schedule::COMMAND];

fn main() -> ExitCode {
    match dispatch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Help(text)) => {
            text::out(&text);
            ExitCode::SUCCESS
        }
        Err(Failure::Usage(text)) => {
            eprintln!("context-parallel: {text}");
            ExitCode::from(2)
        }
        Err(Failure::Failed(text)) => {
            eprintln!("context-parallel: {text}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch() -> Result<(), Failure> {
    use lexopt::prelude::*;
    let mut parser = lexopt::Parser::from_env();
    let word = match parser.next().map_err(|e| Failure::Usage(e.to_string()))? {
        None | Some(Long("help") | Short('h')) => return Err(Failure::Help(help())),
        Some(Long("version") | Short('V')) => {
            return Err(Failure::Help(format!("context-parallel {}\n", env!("CARGO_PKG_VERSION"))));
        }
        Some(Long(name)) => {
            return Err(usage(format!(
                "unknown option --{name}; the command comes first (try context-parallel --help)"
            )));
        }
        Some(Short(letter)) => return Err(usage(format!("unknown option -{letter}"))),
        Some(Value(word)) => word.to_string_lossy().into_owned(),
    };
    match word.as_str() {
        "demo" => demo::run(&demo::COMMAND.read(&mut parser)?),
        "info" => info::run(&info::COMMAND.read(&mut parser)?),
        "plan" => plan::run(&plan::COMMAND.read(&mut parser)?),
        "perf" => perf::run(&perf::COMMAND.read(&mut parser)?),
        "schedule" => schedule::run(&schedule::COMMAND.read(&mut parser)?),
        // One rank of `demo` or `perf`, started by it with the same options.
        "rank" => match parser.value().ok().as_ref().and_then(|v| v.to_str()) {
            Some("demo") => {
                launch::serve(|text| demo::job(&demo::COMMAND.read(&mut parser)?, text))
            }
            Some("perf") => launch::serve(|_| perf::job(&perf::COMMAND.read(&mut parser)?)),
            _ => Err(usage("rank: is started by demo and perf, not by hand")),
        },
        "help" => match parser.value().ok().as_ref().and_then(|v| v.to_str()) {
            None => Err(Failure::Help(help())),
            Some(name) => match COMMANDS.iter().find(|c| c.name == name) {
                Some(command) => Err(Failure::Help(command.help())),
                None => Err(unknown(name)),
            },
        },
        other => Err(unknown(other)),
    }
}

fn unknown(name: &str) -> Failure {
    let near = args::nearest(name, COMMANDS.iter().map(|c| c.name));
    let hint = near.map_or(String::new(), |n| format!("; did you mean {n}?"));
    usage(format!("unknown command {name:?}{hint} (try context-parallel --help)"))
}

fn help() -> String {
    let mut out = format!(
        "context-parallel {}: exact attention over a sequence that is split across ranks, forward and backward\n\n\
         usage: context-parallel COMMAND [OPTIONS]\n\n",
        env!("CARGO_PKG_VERSION")
    );
    for command in COMMANDS {
        out += &format!("  {:<8} {}\n", command.name, command.about);
    }
    out + "\n\
        examples:\n\
        \x20 context-parallel demo                         four processes, one text, all four ways to exchange keys and values\n\
        \x20 context-parallel plan --cp 8 --seq 128k       who sends what to whom, and what it costs\n\
        \x20 context-parallel perf --cp 2 --max-seq 8k     time it on this machine\n\n\
        `context-parallel COMMAND --help` lists a command's options.\n\
        Exit status: 0 success, 1 something failed, 2 the command line is wrong.\n"
}
