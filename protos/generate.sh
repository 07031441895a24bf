#!/usr/bin/env bash
# Compiles protos/ into server/rewardserve/v1. The proto path is the import path, so nothing has to be repaired afterwards.
# usage: protos/generate.sh [OUTPUT_DIR]      (needs grpcio-tools and googleapis-common-protos: the dev extra)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-server}
python=${PYTHON:-python3}
common=$("$python" -c 'import google.rpc, pathlib; print(pathlib.Path(list(google.rpc.__path__)[0]).parents[1])')
mkdir -p "$out"
"$python" -m grpc_tools.protoc -Iprotos -I"$common" --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
  protos/rewardserve/v1/scoring.proto protos/rewardserve/v1/models.proto
