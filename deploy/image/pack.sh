#!/usr/bin/env bash
# Packs a folder into a container image of one layer, with neither a registry nor a daemon. The archive is an OCI image layout
# with Docker's manifest.json beside it: `ctr images import`, `podman load`, `docker load` and `skopeo copy` read it.
# The same folder gives the same digest: names are sorted, times are 1970, everything belongs to root.
#
# usage: pack.sh FOLDER NAME:TAG ENTRYPOINT-AS-JSON OUT.tar
set -euo pipefail
umask 022
folder=$1 name=$2 entrypoint=$3 out=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
blobs=$work/blobs/sha256
mkdir -p "$blobs"
case $(uname -m) in
  x86_64) architecture=amd64 ;;
  aarch64) architecture=arm64 ;;
  *) architecture=$(uname -m) ;;
esac

archive() { tar --create --format=gnu --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner "$@"; }
digest() { sha256sum <"$1" | cut -d' ' -f1; }
# blob FILE: puts a file among the blobs, and prints digest and size
blob() {
  local hash
  hash=$(digest "$1")
  mv "$1" "$blobs/$hash"
  echo "$hash $(stat --format=%s "$blobs/$hash")"
}

archive --directory "$folder" --file "$work/layer" .
unpacked=$(digest "$work/layer")
gzip --best --no-name <"$work/layer" >"$work/layer.gz"
rm "$work/layer"
read -r layer layer_size < <(blob "$work/layer.gz")

jq --null-input --compact-output --arg architecture "$architecture" --argjson entrypoint "$entrypoint" --arg diff "sha256:$unpacked" '{
  architecture: $architecture, os: "linux",
  config: {Entrypoint: $entrypoint, Env: ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
  rootfs: {type: "layers", diff_ids: [$diff]}, history: [{created: "1970-01-01T00:00:00Z", created_by: "pack.sh"}]
}' >"$work/config"
read -r config config_size < <(blob "$work/config")

image=application/vnd.oci.image
jq --null-input --compact-output --arg image "$image" --arg config "sha256:$config" --argjson config_size "$config_size" \
  --arg layer "sha256:$layer" --argjson layer_size "$layer_size" '{
  schemaVersion: 2, mediaType: ($image + ".manifest.v1+json"),
  config: {mediaType: ($image + ".config.v1+json"), digest: $config, size: $config_size},
  layers: [{mediaType: ($image + ".layer.v1.tar+gzip"), digest: $layer, size: $layer_size}]
}' >"$work/manifest"
read -r manifest manifest_size < <(blob "$work/manifest")

jq --null-input --compact-output --arg image "$image" --arg name "$name" --arg manifest "sha256:$manifest" --argjson size "$manifest_size" '{
  schemaVersion: 2, mediaType: ($image + ".index.v1+json"),
  manifests: [{mediaType: ($image + ".manifest.v1+json"), digest: $manifest, size: $size,
    annotations: {"io.containerd.image.name": $name, "org.opencontainers.image.ref.name": ($name | split(":") | last)}}]
}' >"$work/index.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$work/oci-layout"
jq --null-input --compact-output --arg name "$name" --arg config "blobs/sha256/$config" --arg layer "blobs/sha256/$layer" \
  '[{Config: $config, RepoTags: [$name], Layers: [$layer]}]' >"$work/manifest.json"
archive --directory "$work" --file "$out" blobs index.json manifest.json oci-layout
echo "$out: $name sha256:$manifest, $layer_size bytes packed, $(du --summarize --bytes "$folder" | cut -f1) unpacked" >&2
