# The words that people and CI use. Without `just`, each recipe is one ordinary command.

# Lists the words.
default:
    @just --list

# Builds the one executable.
build:
    cargo build --locked -p muster

# Everything that must hold before a commit lands: what CI runs.
test *ARGS:
    ./tests/run {{ARGS}}

# The longer tier, with a dated result file under results/.
long:
    ./tests/run --long

# Formatting and lints only.
lint:
    ./tests/run --only fmt --only clippy

# The rules and the simulated fleet, in seconds.
quick:
    cargo test --locked -p muster-core -p muster-sim

# End to end with real processes.
e2e *ARGS:
    cargo build --locked --workspace --bins
    cargo test --locked -p muster-tests --test e2e -- {{ARGS}}

# What a job must not be able to do, tried. As root.
hostile:
    ./tests/run --only hostile

# A real host in a QEMU guest: units, limits, drain, power-off, and the attacks that would harm this one. As root.
guest:
    ./tests/run --only guest

# Bans, licences and sources of dependencies.
deny:
    cargo deny check bans licenses sources

# A fleet on this machine doing real work, with scale-out and scale-in.
demo *ARGS:
    cargo run --locked -p muster -- demo {{ARGS}}
