#!/bin/sh
# The command `qlora`, which `make setup` copies into the environment: runs the tools of the checkout that the current folder lies in.
root=$PWD
until [ -f "$root/tools/__main__.py" ]; do
    if [ "$root" = / ]; then
        echo "error: $PWD lies in no checkout of this project: cd to one" >&2
        exit 2
    fi
    root=$(dirname "$root")
done
bin=$(dirname "$(command -v "$0")")
QLORA_FROM=$PWD PATH=$bin:$PATH
export QLORA_FROM PATH
cd "$root" && exec "$bin/python" -m tools "$@"
