#!/usr/bin/env bash
# Installs detectron2's Python code, without its compiled operators, from the package registry.
#
#   tools/install_detectron2.sh [VENV]        (.venv when not given)
#
# The official way needs git, a compiler and the repository:
#
#   VENV/bin/pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'
#
# Use this script where one of them is out of reach. It installs a wheel that the registry holds for Python
# 3.10; its Python code runs on later ones too, its operators do not load there: rotated boxes, deformable
# convolution and the C++ evaluation are missing, models of ordinary boxes are complete. Every file is pinned
# and checked by its hash, and nothing but setuptools is changed in the environment: dependencies are not
# resolved, because the wheel and hydra state upper bounds that they do not need.
set -euo pipefail

venv=${1:-.venv}
python=$venv/bin/python
if [ ! -x "$python" ]; then
    echo "error: there is no environment in $venv; give its folder, or make it with \`make install\`" >&2
    exit 2
fi
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("detectron2") is None)'; then
    exit 0
fi

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# The last of setuptools that brings pkg_resources, which detectron2's model zoo imports.
cat >"$folder/setuptools.txt" <<'PINS'
setuptools==80.10.2 --hash=sha256:95b30ddfb717250edb492926c92b5221f7ef3fbcc2b07579bcd4a27da21d0173
PINS
cat >"$folder/needs.txt" <<'PINS'
antlr4-python3-runtime==4.9.3 --hash=sha256:f224469b4168294902bb1efa80a8bf7855f24c99aef99cbefc1bcd3cce77881b
cloudpickle==3.1.2 --hash=sha256:9acb47f6afd73f60dc1df93bb801b472f05ff42fa6c84167d25cb206be1fbf4a
fvcore==0.1.5.post20221221 --hash=sha256:f2fb0bb90572ae651c11c78e20493ed19b2240550a7e4bbb2d6de87bdd037860
hydra-core==1.3.8 --hash=sha256:d5f184c291691cba835c7f04bc4e36270ad88b1d7e394a3712f5af084c30b394
iopath==0.1.10 --hash=sha256:3311c16a4d9137223e20f141655759933e1eda24f8bff166af834af3c645ef01
portalocker==4.4.2 --hash=sha256:e661b91af34fc1806740f8e0e42990fe55cd85cbae55675ac48a400a9656a51b
tabulate==0.10.0 --hash=sha256:f0b0622e567335c8fabaaa659f1b33bcb6ddfe2e496071b743aa113f8774f2d3
termcolor==3.3.0 --hash=sha256:cf642efadaf0a8ebbbf4bc7a31cec2f9b5f21a9f726f4ccbb08192c9c26f43a5
yacs==0.1.8 --hash=sha256:99f893e30497a4b66842821bac316386f7bd5c4f47ad35c9073ef089aa33af32
PINS
cat >"$folder/detectron2.txt" <<'PINS'
sal-detectron2==0.7.2 --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561
PINS

echo "installing detectron2 into $venv"
pip install -qq --no-deps --require-hashes -r "$folder/setuptools.txt"
# Some of these are source packages of plain Python: built with the setuptools above, not with a later one.
pip install -qq --no-deps --require-hashes --no-build-isolation -r "$folder/needs.txt"
pip install -qq --no-deps --require-hashes --only-binary=:all: --python-version 3.10 \
    --target "$folder/wheel" -r "$folder/detectron2.txt"
# The wheel also holds a top-level package `tools`, which would take that name from everybody else's, and
# operators that load on Python 3.10 only. detectron2 itself is moved last: where it is, all the rest is.
rm -f "$folder"/wheel/detectron2/_C.*.so
rm -rf "$site"/sal_detectron2-*.dist-info
mv "$folder"/wheel/*.dist-info "$site"/
mv "$folder/wheel/detectron2" "$site/detectron2"
