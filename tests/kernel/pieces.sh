# Sourced by image.sh and host-image.sh, from this folder: packages that are downloaded and unpacked, never installed,
# and what goes from them into a guest. Sets `cache`, `dir`, `tree` and `version`.

say() { echo "kernel-test: $*" >&2; }
lacks() { say "missing: $*"; exit 3; }
export PATH="$PATH:/usr/sbin:/sbin"

[[ $(uname -m) == x86_64 ]] || lacks "an x86_64 machine (this one is $(uname -m))"
[[ $(id -u) == 0 ]] || lacks root
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || lacks "apt-get and dpkg-deb, for the kernel's package"

declare -A need=([qemu-system-x86_64]=qemu-system-x86 [cpio]=cpio [depmod]=kmod [modprobe]=kmod [xz]=xz-utils
  [unshare]=util-linux [ip]=iproute2 [nft]=nftables [wg]=wireguard-tools [mke2fs]=e2fsprogs)
updated=
update() {
  [[ -n $updated ]] || { say "reading the package lists"; apt-get update -qq >&2 || lacks "apt's package lists"; }
  updated=yes
}
absent=()
for program in "${!need[@]}"; do
  command -v "$program" >/dev/null || absent+=("${need[$program]}")
done
if ((${#absent[@]} > 0)); then
  update
  say "installing the Debian packages ${absent[*]}"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${absent[@]}" >/dev/null ||
    lacks "the Debian packages ${absent[*]}"
fi

cache=${SENNIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sennit}
mkdir -p "$cache"
exec 9>"$cache/kernel.lock"
flock 9

# The meta package names the current kernel of this distribution. Without apt's lists one that is unpacked will do.
kernel_package() {
  { apt-cache depends linux-image-cloud-amd64 2>/dev/null || true; } | awk '$1 == "Depends:" {print $2; exit}'
}
unpacked_package() {
  find "$cache" -maxdepth 2 -path '*/kernel-*/root' -printf '%P\n' | sort -V |
    sed -n '$s|^kernel-\(.*\)/root$|linux-image-\1|p'
}
package=$(kernel_package)
[[ -n $package ]] || package=$(unpacked_package)
if [[ -z $package ]]; then
  update
  package=$(kernel_package)
fi
[[ -n $package ]] || lacks "the package linux-image-cloud-amd64 in apt's lists"
version=${package#linux-image-}
dir=$cache/kernel-$version

# unpack DIR PACKAGE...: downloads packages and unpacks them into one folder, all or none.
unpack() {
  local to=$1 new=$1.new deb
  shift
  [[ -d $to ]] && return
  rm -rf "$new" && mkdir -p "$new/deb"
  say "downloading $*"
  if ! (cd "$new/deb" && apt-get download -qq -o APT::Sandbox::User=root "$@" >&2); then
    update
    (cd "$new/deb" && apt-get download -qq -o APT::Sandbox::User=root "$@" >&2) || lacks "one of the packages $*"
  fi
  say "unpacking $*"
  for deb in "$new"/deb/*.deb; do dpkg-deb -x "$deb" "$new"; done
  rm -rf "$new/deb"
  mv "$new" "$to"
}
mkdir -p "$dir"
unpack "$dir/root" "$package"
unpack "$dir/busybox" busybox-static
tree=$dir/root
[[ -f $tree/lib/modules/$version/modules.dep.bin ]] || depmod -b "$tree" "$version"

# put ROOT PROGRAM...: copies busybox with its applets, programs and the libraries of these into a guest's root.
put() {
  local root=$1 applet program library
  shift
  cp "$dir/busybox/bin/busybox" "$root/bin/"
  for applet in $("$dir/busybox/bin/busybox" --list); do
    [[ -e $root/bin/$applet ]] || ln -s busybox "$root/bin/$applet"
  done
  for program in "$@"; do
    rm -f "$root/bin/${program##*/}"
    cp -L "$program" "$root/bin/"
  done
  # Busybox as a shell would take its own applets before the programs of the same name.
  [[ ! -e $root/bin/bash ]] || ln -sf bash "$root/bin/sh"
  libraries "$@" | while read -r library; do
    mkdir -p "$root${library%/*}"
    cp -L "$library" "$root$library"
  done
}

# libraries PROGRAM...: what these are linked with, the loader included.
libraries() {
  local library
  ldd "$@" | grep -oE '/[^ )]+' | grep -v ':$' | sort -u | while read -r library; do
    [[ -f $library && " $* " != *" $library "* ]] && echo "$library"
  done || true
}

# files_of MODULE...: the files of kernel modules, each after those that it needs.
files_of() {
  local module needs
  for module in "$@"; do
    needs=$(modprobe -d "$tree" -S "$version" --show-depends "$module") || lacks "the module $module in $package"
    awk '/^insmod/ {print $2}' <<<"$needs"
  done | awk '!seen[$0]++'
}

# put_in_order FOLDER MODULE...: copies modules with numbers before their names, for insmod one after the other.
put_in_order() {
  local folder=$1 number=100 file name
  shift
  files_of "$@" | while read -r file; do
    number=$((number + 1))
    name=${file##*/}
    case $file in
      *.xz) xz -dc "$file" >"$folder/$number-${name%.xz}" ;;
      *) cp "$file" "$folder/$number-$name" ;;
    esac
  done
}

archive() { (cd "$1" && find . -print0 | cpio -o -0 -H newc -R 0:0 --quiet); }
