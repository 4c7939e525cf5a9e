#!/usr/bin/env bash
# Gets the WireGuard programs that the bench compares mesh-wg with, and prints the folder of links to them:
#   wireguard-go   the newest of Debian sid, unpacked and not installed (older ones do without offloads)
#   boringtun-cli  the newest release, built by cargo
# Kept by version in ${SENNIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sennit}/peers. What is there already is not looked
# up again, unless with --update. What cannot be had is said, and the bench does without.
set -euo pipefail
cache=${SENNIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sennit}/peers
update=${1:-}
mkdir -p "$cache/bin"
say() { echo "peers: $*" >&2; }
have() { [[ $update != --update && -x $cache/bin/$1 ]]; }
# link NAME FILE ORIGIN: the manifest is read by meshbench
link() {
  ln -sfn "$2" "$cache/bin/$1"
  { grep -v "^$1 " "$cache/manifest" 2>/dev/null || :; echo "$1 $3 sha256 $(sha256sum <"$2" | cut -d' ' -f1)"; } >"$cache/manifest.new"
  mv "$cache/manifest.new" "$cache/manifest"
  say "$(tail -n 1 "$cache/manifest")"
}

wireguard_go() {
  local mirror keyring dir options deb version
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { say "no apt-get and dpkg-deb"; return 1; }
  mirror=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
    awk '$1 == "Debian" && $2 !~ /security/ {print $2; exit}')
  [[ -n $mirror ]] || { say "apt has no Debian mirror among its sources"; return 1; }
  # The keyring named beside the mirror; without one apt goes by those it trusts for all.
  keyring=$(cat /etc/apt/sources.list.d/*.sources 2>/dev/null | awk -v RS= -v uri="${mirror%/}" 'index($0, uri)' |
    sed -n 's/^Signed-By: *//p' | head -n 1)
  dir=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$dir'" EXIT
  mkdir -p "$dir"/{lists/partial,archives/partial,package}
  : >"$dir/status"
  echo "deb ${keyring:+[signed-by=$keyring] }$mirror sid main" >"$dir/sources.list"
  options=(-q -o "Dir::State=$dir" -o "Dir::State::lists=$dir/lists" -o "Dir::State::status=$dir/status"
    -o "Dir::Cache=$dir" -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=- -o Acquire::Languages=none
    -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false -o "APT::Sandbox::User=$(id -un)")
  say "reading the package list of Debian sid (about 11 MB)"
  apt-get "${options[@]}" update >&2
  (cd "$dir" && apt-get "${options[@]}" download wireguard-go >&2)
  deb=$(echo "$dir"/wireguard-go_*.deb)
  version=$(dpkg-deb -f "$deb" Version)
  rm -rf "$cache/wireguard-go-$version"
  dpkg-deb -x "$deb" "$dir/package"
  mv "$dir/package" "$cache/wireguard-go-$version"
  link wireguard-go "$cache/wireguard-go-$version/usr/bin/wireguard-go" \
    "debian-sid $version deb-sha256 $(sha256sum <"$deb" | cut -d' ' -f1)"
}

boringtun_cli() {
  local version root="$cache/boringtun-cli-building"
  command -v cargo >/dev/null || { say "no cargo"; return 1; }
  say "building boringtun-cli (a minute or two)"
  rm -rf "$root"
  # A target directory of its own: the project's settings are not this program's.
  (cd "$cache" && CARGO_TARGET_DIR=$root/target cargo install --root "$root" boringtun-cli --locked >&2)
  version=$("$root/bin/boringtun-cli" --version | awk '{print $2}')
  rm -rf "$root/target" "$cache/boringtun-cli-$version"
  mv "$root" "$cache/boringtun-cli-$version"
  link boringtun-cli "$cache/boringtun-cli-$version/bin/boringtun-cli" "crate $version"
}

# Each in a process of its own: in a function called behind `||` an error would stop nothing.
case ${1:-} in
  wireguard-go) wireguard_go; exit ;;
  boringtun-cli) boringtun_cli; exit ;;
esac
have wireguard-go || "$0" wireguard-go || say "SKIPPED wireguard-go of Debian sid; one on PATH is used instead, if any"
have boringtun-cli || "$0" boringtun-cli || say "SKIPPED boringtun-cli"
echo "$cache/bin"
