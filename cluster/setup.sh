#!/usr/bin/env bash
# What every node gets before Ray starts on it: an environment of its own in ~/.rayft/env with the wheel that `make wheel`
# built, so that all nodes run this very version. A node that has this wheel is left as it is.
#
#     bash ~/.rayft/setup.sh RAY_VERSION EXTRAS        e.g. 2.60.0 molecules,docking; PYTHON names an interpreter >= 3.11
set -euo pipefail
ray_version=$1 extras=${2:+,$2}
cd ~/.rayft
chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token

[ -x env/bin/python ] || "${PYTHON:-python3}" -m venv env
install() { env/bin/python -m pip install --quiet --disable-pip-version-check --no-input "$@"; }

wheel=$PWD/$(ls -t dist/*.whl | head -n 1) # older ones may lie there from before
wanted="$(sha256sum < "$wheel") $ray_version$extras"
if [ "$wanted" != "$(cat installed 2>/dev/null)" ]; then
    index=(--extra-index-url https://download.pytorch.org/whl/cpu) # torch without CUDA is a twentieth of the size
    if nvidia-smi >/dev/null 2>&1; then index=(); fi
    install "${index[@]}" "$wheel[cluster$extras]" "ray==$ray_version"
    install --no-deps --force-reinstall "$wheel" # pip takes another wheel of the same version for the same one
    echo "$wanted" > installed
fi
grep -qs rayft/env ~/.bashrc || echo 'export PATH="$HOME/.rayft/env/bin:$PATH" RAY_AUTH_MODE=token' >> ~/.bashrc
