#!/usr/bin/env bash
# Gets the programs of a real Kubernetes cluster and prints the folder that holds them:
#   kube-apiserver, kubectl, ...   built from the Go module proxy; the first time takes ten minutes and 2 GB of memory
#   etcd                           from the Debian package etcd-server, unpacked and not installed
# Kept by version in ${SENNIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sennit}/kube, with the SHA-256 of each in `manifest`.
# What is there already is neither built nor looked up again. Exit code 3: something cannot be had here, and is named.
#
# usage: binaries.sh [--nodes]     with --nodes also what whole nodes need: kubelet, controller-manager, scheduler, kube-proxy
set -euo pipefail
version=1.36.3
cache=${SENNIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sennit}/kube/v$version
programs=(kube-apiserver kubectl)
[[ ${1:-} != --nodes ]] || programs+=(kube-controller-manager kube-scheduler kubelet kube-proxy)
started=$SECONDS
mkdir -p "$cache/bin"
say() { echo "kube: $((SECONDS - started)) s: $*" >&2; }
lacking() { say "cannot be had here: $*"; exit 3; }

# record NAME ORIGIN: the manifest says what each program is and where it came from
record() {
  { grep -v "^$1 " "$cache/manifest" 2>/dev/null || :; echo "$1 $2 sha256 $(sha256sum <"$cache/bin/$1" | cut -d' ' -f1)"; } >"$cache/manifest.new"
  mv "$cache/manifest.new" "$cache/manifest"
  say "$(tail -n 1 "$cache/manifest")"
}

# A module that requires Kubernetes. Its libraries are developed in its own repository, so its go.mod names them as v0.0.0:
# the versions that belong to it are put in their place.
module() {
  local dir=$cache/module gomod library
  [[ -f $dir/ready ]] && return
  mkdir -p "$dir"
  cd "$dir"
  say "reading k8s.io/kubernetes v$version from the Go module proxy"
  gomod=$(go mod download -json "k8s.io/kubernetes@v$version" | jq -r .GoMod) || lacking "k8s.io/kubernetes v$version"
  {
    echo "module sennit.invalid/kube"
    awk '$1 == "go" || $1 == "godebug" && NF == 2' "$gomod"
    echo "require k8s.io/kubernetes v$version"
    awk '$1 ~ /^k8s.io\// && $2 == "v0.0.0" {print $1}' "$gomod" | sort -u | while read -r library; do
      echo "replace $library => $library v0.${version#1.}"
    done
  } >go.mod
  # `tool`, because a program cannot be imported.
  for program in kube-apiserver kubectl kube-controller-manager kube-scheduler kubelet kube-proxy; do
    echo "tool k8s.io/kubernetes/cmd/$program"
  done >>go.mod
  go mod tidy 2>"$dir/tidy.log" || { tail -n 5 "$dir/tidy.log" >&2; lacking "the modules of Kubernetes"; }
  touch "$dir/ready"
}

build() {
  local program=$1 package total=0 began=$SECONDS
  [[ -x $cache/bin/$program ]] && return
  command -v go >/dev/null || lacking "$program: there is no Go (1.26 is needed; 1.27 miscompiles its OpenAPI)"
  command -v jq >/dev/null || lacking "$program: there is no jq"
  (module)
  package=k8s.io/kubernetes/cmd/$program
  cd "$cache/module"
  say "building $program"
  # -v names each package as it is compiled.
  CGO_ENABLED=0 go build -v -trimpath -o "$cache/bin/.$program" \
    -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=v$version -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=${version:2:2}" \
    "$package" 2>&1 | while read -r line; do
    total=$((total + 1))
    case $line in
      *\ *) echo "$line" >&2 ;;
      *) ((total % 100 != 0)) || say "$program: $total packages compiled" ;;
    esac
  done || lacking "$program did not build"
  mv "$cache/bin/.$program" "$cache/bin/$program"
  record "$program" "go-module k8s.io/kubernetes v$version built-in $((SECONDS - began)) s with $(go env GOVERSION)"
}

# deb PACKAGE FILE...: takes programs out of a Debian package
deb() {
  local package=$1 dir file version
  shift
  for file; do [[ -x $cache/bin/${file##*/} ]] || break; done
  [[ ! -x $cache/bin/${file##*/} ]] || return 0
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || lacking "$package: there are no apt-get and dpkg-deb"
  dir=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$dir'" RETURN
  chmod 755 "$dir"
  [[ -n $(ls /var/lib/apt/lists/*_Packages* 2>/dev/null) ]] || apt-get -q update >&2
  (cd "$dir" && apt-get -q download "$package" >&2) || lacking "the Debian package $package"
  version=$(dpkg-deb -f "$dir"/*.deb Version)
  dpkg-deb -x "$dir"/*.deb "$dir/package"
  for file; do
    install -m 755 "$dir/package/$file" "$cache/bin/"
    record "${file##*/}" "debian-package $package $version"
  done
}

deb etcd-server usr/bin/etcd
for program in "${programs[@]}"; do build "$program"; done
echo "$cache/bin"
