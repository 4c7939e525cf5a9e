#!/usr/bin/env bash
# Builds all programs and all tests, and tells where they are: a line with folder, name and path of each test program.
# All packages that are built by default together, always, and programs with tests: a selection of them, or programs alone, choose other features of dependencies,
# and build half of these anew.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --bins --tests --locked >&2
# Cargo, which has nothing left to do, says where it put things.
cargo test --locked --no-run --message-format=json 2>/dev/null |
  jq -r --arg here "$PWD/" 'select(.executable != null and .profile.test) |
    "\(.manifest_path | ltrimstr($here) | rtrimstr("/Cargo.toml")) \(.target.name) \(.executable)"'
