#!/usr/bin/env bash
# `make containers`: builds the images, writes the bill of materials, and lets three hospitals' containers and the
# aggregator's federate through the proxy on this machine. Where containers cannot run it says why, and the same federation
# runs as processes. BASE, NGINX and PODMAN_BUILD_OPTIONS (such as build arguments for pip) come from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

instead() {
    echo "containers cannot run here: $1"
    echo "the same federation as processes:"
    exec make deployment
}

command -v podman > /dev/null || instead "podman is not installed"
base=${BASE:-docker.io/library/python:3.11-slim-bookworm}
nginx=${NGINX:-docker.io/library/nginx:1.28-alpine}
podman image exists "$base" || podman pull --quiet "$base" || instead "the base image $base cannot be fetched"
podman image exists "$nginx" || podman pull --quiet "$nginx" || instead "the image $nginx cannot be fetched"
if ! podman run --rm --read-only --cap-drop=all "$base" true; then
    # Hosts that are containers or small machines themselves: lower limits, and runc instead of crun.
    CONTAINERS_CONF=$(mktemp)
    printf '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]\n[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\n' > "$CONTAINERS_CONF"
    export CONTAINERS_CONF
    podman run --rm --read-only --cap-drop=all "$base" true || instead "podman starts no container"
fi

read -ra options <<< "${PODMAN_BUILD_OPTIONS:-}"
for side in node aggregator; do
    podman build --quiet --layers --format docker -f deploy/Containerfile --target "$side" \
        --build-arg BASE="$base" "${options[@]}" -t "islet-$side" .
done
podman build --quiet --format docker -f deploy/proxy.Containerfile --build-arg NGINX="$nginx" -t islet-proxy .
podman run --rm --entrypoint cat islet-node /opt/islet/sbom.cdx.json > islet.cdx.json
echo "bill of materials: islet.cdx.json"
podman images --digests --filter reference='localhost/islet-*' --format '{{.Repository}} {{.Size}} {{.Digest}}'
exec "$python" -m pytest -q -s -m containers tests/deployment
