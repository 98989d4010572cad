#!/usr/bin/env bash
# Everything worth measuring on one GPU, in one call of under nine minutes:
#
#   benchmarks/gpu_suite.sh [FOLDER]             results to FOLDER (default benchmarks/results/gpu)
#   DRY_RUN=1 benchmarks/gpu_suite.sh FOLDER     the same programs on the CPU, tiny: do they work
#
# PYTHON names the interpreter (default python3); the package need not be installed. Each part has its time
# limit, writes its JSON as it goes, the most wanted first, and cannot stop the others; suite.jsonl has a line for
# every part that ran, suite.log all output. The exit code is the number of parts that failed.
#
# Most of the time goes into compiling, so the parts share JAX's compilation cache, and with it XLA's tuning of
# single products and convolutions, which programs of different parts have in common. It is new and thrown away at the
# end; JAX_COMPILATION_CACHE_DIR names one to keep, which makes a second run faster and its compile times untrue.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 70

out=${1:-benchmarks/results/gpu}
python=${PYTHON:-python3}
dry=${DRY_RUN:-0}
total=530
((dry == 1)) && total=1700 # nothing is timed
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}

mkdir -p "$out" || exit 73
if [ -z "${JAX_COMPILATION_CACHE_DIR:-}" ]; then
  JAX_COMPILATION_CACHE_DIR=$(mktemp -d) || exit 73
  trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
fi
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$JAX_COMPILATION_CACHE_DIR/torch}
log=$out/suite.log
: >"$log"
: >"$out/suite.jsonl"
failed=0

# part NAME SECONDS COMMAND...: runs the command within its limit and what is left of the whole time.
part() {
  local name=$1 limit=$2 start=$SECONDS code status
  shift 2
  ((dry == 1 || limit > total - SECONDS)) && limit=$((total - SECONDS))
  echo "== $name (at most $limit s): $*" | tee -a "$log"
  if ((limit < 1)); then
    code=124
  else
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
  fi
  case $code in 0) status=ok ;; 124 | 137) status=timeout ;; *) status=failed ;; esac
  ((code == 0)) || failed=$((failed + 1))
  printf '{"part": "%s", "status": "%s", "exit": %d, "seconds": %d}\n' \
    "$name" "$status" "$code" $((SECONDS - start)) | tee -a "$out/suite.jsonl" "$log"
}

check_device='import sys, jax
from benchmarks.measure import environment, write
write(sys.argv[1], environment())
print(jax.devices(), jax.__version__)
sys.exit(0 if sys.argv[2] == "1" or jax.default_backend() == "gpu" else "no GPU: use DRY_RUN=1 on a CPU")'

if [ "$dry" = 1 ]; then
  # Compiled for the test's sake alone: quickly, not well.
  export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_backend_optimization_level=0"
  parity=(--preset tiny --layers 1 --size 16x16 --frames 5)
  throughput=(--preset tiny --layers 1 --size 16x16 --frames 5 --steps 2 --matmul 128)
  attention=(--preset tiny --size 16x16 --frames 9 --repeats 2 --matmul 128)
  method=(--preset tiny --layers 2 --size 16x16 --frames 9 --repeats 1 --layer-repeats 1 --dtype float32)
  streaming=(--preset tiny --layers 2 --size 16x16 --frames 5 --repeats 1 --dtype float32)
  vae=(--preset tiny --size 16x16 --frames 5 --steps 1 --matmul 128 --conv3d auto)
  # Dynamo traces without a backend: that needs no compiler.
  diffusers=(--preset tiny --layers 1 --size 32x32 --frames 5 --repeats 2 --torch-compile eager
    --vae-base 4 --vae-size 16x16 --vae-frames 5)
  tests=(--collect-only -q)
else
  parity=(--preset flf2v_14b --layers 2 --size 480x864 --frames 9)
  throughput=(--preset flf2v_14b --size 480x864 --frames 81 --steps 3)
  attention=(--preset flf2v_14b --size 480x864 --frames 81 --repeats 5)
  # A quarter of the depth, and of the layers with KAB.
  method=(--preset flf2v_14b --layers 10 --size 480x864 --frames 81 --repeats 3 --layer-repeats 5 --dtype bfloat16)
  streaming=(--preset flf2v_14b --layers 4 --size 480x864 --frames 81 --repeats 2 --dtype bfloat16)
  # The autoencoder's time is linear in frames, and its programs take 12 to 39 s to compile.
  vae=(--preset flf2v_14b --size 480x864 --frames 9 --steps 2 --conv3d taps conv3d)
  # All tokens, so that attention has its share; the weights are drawn on the CPU, 0.4 billion a layer.
  diffusers=(--preset flf2v_14b --layers 2 --size 480x864 --frames 81 --torch-compile inductor
    --vae-base 96 --vae-size 240x432 --vae-frames 9 --repeats 5)
  tests=(-q)
fi

part device 30 "$python" -c "$check_device" "$out/device.json" "$dry"
((failed == 0)) || exit 1
# Nothing is timed here, so no time goes into tuning.
part parity 85 env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0" "$python" -m benchmarks.gpu_parity "${parity[@]}" --out "$out/parity.json"
part throughput 120 "$python" -m benchmarks.throughput "${throughput[@]}" --dtype bfloat16 \
  --guidance sequential batched --out "$out/throughput.json"
part attention 70 "$python" -m benchmarks.attention "${attention[@]}" --out "$out/attention.json"
part method 100 "$python" -m benchmarks.method_cost "${method[@]}" --out "$out/method.json"
part vae 110 "$python" -m benchmarks.throughput "${vae[@]}" --no-dit --vae --out "$out/vae.json"
part streaming 70 "$python" -m benchmarks.streaming "${streaming[@]}" --out "$out/streaming.json"
# Only files that have such tests are collected: the others may need packages that a GPU machine lacks.
mapfile -t files < <(grep -lE 'mark\.gpu\b' tests/test_*.py)
if ((${#files[@]})); then
  part tests 40 "$python" -m pytest -m gpu "${tests[@]}" "${files[@]}"
else
  echo "== tests: none has the mark gpu, skipped" | tee -a "$log"
fi
part diffusers 120 "$python" -m benchmarks.vs_diffusers "${diffusers[@]}" --dtype bfloat16 \
  --out "$out/diffusers.json"

echo "== $failed of $(wc -l <"$out/suite.jsonl") parts failed; results in $out" | tee -a "$log"
exit "$failed"
