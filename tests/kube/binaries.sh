#!/usr/bin/env bash
# Gets the programs of a real Kubernetes cluster and prints the folder that holds them:
#   kube-apiserver, kubectl, helm, ...   built from the Go module proxy; the first time takes ten minutes and 2 GB of memory
#   etcd, containerd, libfaketime, ...   from Debian packages, unpacked and not installed; CNI plugins go into `cni` beside `bin`
# Kept by version in ${SENNIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sennit}/kube, with the SHA-256 of each in `manifest`.
# What is there already is neither built nor looked up again. Exit code 3: something cannot be had here, and is named.
#
# usage: binaries.sh [--nodes]     with --nodes also what whole nodes need: kubelet, controller-manager, scheduler, kube-proxy,
#                                  containerd, runc, CNI plugins, busybox; and helm
set -euo pipefail
version=1.36.3
helm=3.22.0
cache=${SENNIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sennit}/kube/v$version
programs=(kube-apiserver kubectl)
nodes=false
[[ ${1:-} != --nodes ]] || nodes=true
! $nodes || programs+=(kube-controller-manager kube-scheduler kubelet kube-proxy)
started=$SECONDS
mkdir -p "$cache/bin" "$cache/cni"
say() { echo "kube: $((SECONDS - started)) s: $*" >&2; }
lacking() { say "cannot be had here: $*"; exit 3; }

# record FOLDER/NAME ORIGIN: the manifest says what each program is and where it came from
record() {
  { grep -v "^$1 " "$cache/manifest" 2>/dev/null || :; echo "$1 $2 sha256 $(sha256sum <"$cache/$1" | cut -d' ' -f1)"; } >"$cache/manifest.new"
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

# A module that requires Helm, at the version that it was released with.
helm_module() {
  local dir=$cache/helm-module gomod
  [[ -f $dir/ready ]] && return
  mkdir -p "$dir"
  cd "$dir"
  say "reading helm.sh/helm/v3 v$helm from the Go module proxy"
  gomod=$(go mod download -json "helm.sh/helm/v3@v$helm" | jq -r .GoMod) || lacking "helm.sh/helm/v3 v$helm"
  {
    echo "module sennit.invalid/helm"
    awk '$1 == "go" && NF == 2' "$gomod"
    echo "require helm.sh/helm/v3 v$helm"
    echo "tool helm.sh/helm/v3/cmd/helm"
  } >go.mod
  go mod tidy 2>"$dir/tidy.log" || { tail -n 5 "$dir/tidy.log" >&2; lacking "the modules of Helm"; }
  touch "$dir/ready"
}

# build PROGRAM PACKAGE ORIGIN MODULE-FOLDER LDFLAGS
build() {
  local program=$1 package=$2 origin=$3 module=$4 flags=$5 total=0 began=$SECONDS
  cd "$cache/$module"
  say "building $program"
  # -v names each package as it is compiled.
  CGO_ENABLED=0 go build -v -trimpath -o "$cache/bin/.$program" \
    -ldflags "-s -w $flags" "$package" 2>&1 | while read -r line; do
    total=$((total + 1))
    case $line in
      *\ *) echo "$line" >&2 ;;
      *) ((total % 100 != 0)) || say "$program: $total packages compiled" ;;
    esac
  done || lacking "$program did not build"
  mv "$cache/bin/.$program" "$cache/bin/$program"
  record "bin/$program" "go-module $origin built-in $((SECONDS - began)) s with $(go env GOVERSION)"
}

needs_go() {
  command -v go >/dev/null || lacking "$1: there is no Go (1.26 is needed; 1.27 miscompiles its OpenAPI)"
  command -v jq >/dev/null || lacking "$1: there is no jq"
}

kubernetes() {
  local stamp=k8s.io/component-base/version
  [[ -x $cache/bin/$1 ]] && return
  needs_go "$1"
  (module)
  (build "$1" "k8s.io/kubernetes/cmd/$1" "k8s.io/kubernetes v$version" module \
    "-X $stamp.gitVersion=v$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=${version:2:2}")
}

helm() {
  [[ -x $cache/bin/helm ]] && return
  needs_go helm
  (helm_module)
  (build helm helm.sh/helm/v3/cmd/helm "helm.sh/helm/v3 v$helm" helm-module "")
}

# deb PACKAGE FOLDER FILE...: takes programs out of a Debian package, into `bin` or `cni`
deb() {
  local package=$1 folder=$2 dir file version
  shift 2
  for file; do [[ -x $cache/$folder/${file##*/} ]] || break; done
  [[ ! -x $cache/$folder/${file##*/} ]] || return 0
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || lacking "$package: there are no apt-get and dpkg-deb"
  dir=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$dir'" RETURN
  # apt-get downloads as a user of its own.
  chmod 777 "$dir"
  [[ -n $(ls /var/lib/apt/lists/*_Packages* 2>/dev/null) ]] || apt-get -q update >&2
  (cd "$dir" && apt-get -q download "$package" >&2) || lacking "the Debian package $package"
  version=$(dpkg-deb -f "$dir"/*.deb Version)
  dpkg-deb -x "$dir"/*.deb "$dir/package"
  for file; do
    install -m 755 "$dir/package/$file" "$cache/$folder/"
    record "$folder/${file##*/}" "debian-package $package $version"
  done
}

deb etcd-server bin usr/bin/etcd
# The MT of its names is for programs with threads.
deb libfaketime bin usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1
for program in "${programs[@]}"; do kubernetes "$program"; done
if $nodes; then
  deb containerd bin usr/bin/ctr usr/bin/containerd-shim-runc-v2 usr/bin/containerd
  deb runc bin usr/sbin/runc
  deb busybox-static bin bin/busybox
  deb containernetworking-plugins cni usr/lib/cni/loopback usr/lib/cni/host-local usr/lib/cni/bridge
  helm
fi
echo "$cache/bin"
