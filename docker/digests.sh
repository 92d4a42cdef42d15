#!/bin/sh
# Fill the empty digests of versions.env from the registries. Needs docker buildx and a login where a registry wants one;
# images that docker/ itself builds have a digest only once they were pushed, and are left alone.
set -eu
file=$(dirname "$0")/../toolchain/core/versions.env

grep -E '^[A-Z0-9_]+_DIGEST=$' "$file" | while IFS= read -r line; do
    name=${line%_DIGEST=}
    image=$(sed -n "s/^${name}_IMAGE=//p" "$file")
    case $image in
        */*) ;;
        *) continue ;;
    esac
    digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$image")
    case $digest in
        sha256:*) ;;
        *)
            echo "no digest of $image: $digest" >&2
            exit 1
            ;;
    esac
    sed "s|^${name}_DIGEST=\$|${name}_DIGEST=$digest|" "$file" >"$file.new"
    mv "$file.new" "$file"
    echo "$image $digest"
done
