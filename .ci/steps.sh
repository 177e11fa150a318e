# shellcheck shell=bash disable=SC2034
# Shared by the scripts of this folder: `step NAME COMMAND...` prints the name, runs the command, prints the seconds.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

step() {
  local name=$1 start=$SECONDS
  shift
  printf '\n=== %s\n' "$name"
  "$@"
  printf '=== %s: done in %d s\n' "$name" $((SECONDS - start))
}
