//! The `muster` executable; all of it is in the library, where tests reach it.

use std::process::ExitCode;

fn main() -> ExitCode {
    muster::main()
}
