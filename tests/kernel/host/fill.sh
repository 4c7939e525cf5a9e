#!/usr/bin/env bash
# fill.sh ROOT PROGRAMS DISK: makes the disk of a host with the agent, the units of deploy/systemd and the lab's own.
# ROOT is the folder of host-image.sh; what is below PROGRAMS comes on top of it.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PATH:/usr/sbin:/sbin"
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
cp -a "$1/." "$new/"
# Its /bin and /lib are links.
tar -C "$2" -c . | tar -C "$new" -x --keep-directory-symlink
chmod 755 "$new"
install -m 755 bin/* "$new/usr/bin/"
units=$new/usr/lib/systemd/system
install -m 644 units/*.service ../../../deploy/systemd/sennit-{agent,guard}.service "$units/"
# As `systemctl enable` does.
for unit in units/*.service ../../../deploy/systemd/sennit-{agent,guard}.service; do
  wants=$new/etc/systemd/system/$(sed -n 's/^WantedBy=//p' "$unit").wants
  mkdir -p "$wants"
  ln -s "/usr/lib/systemd/system/${unit##*/}" "$wants/"
done
# There is no journal: what units say is in the kernel's log.
mkdir "$new/etc/systemd/system.conf.d"
printf '[Manager]\nDefaultStandardOutput=kmsg\n' >"$new/etc/systemd/system.conf.d/lab.conf"
# Little room, so that a test fills it soon.
size=$(($(du -sm "$new" | cut -f 1) + 96))
rm -f "$3"
mke2fs -q -F -t ext4 -m 0 -E lazy_itable_init=0,lazy_journal_init=0 -J size=4 -d "$new" "$3" "${size}M" >/dev/null
