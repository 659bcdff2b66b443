# shellcheck shell=bash
# Where the judges' tools are. Sourced, never run.

judges_repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The Python that has `cryptography` and `pkilint`, and none of our code.
judges_python() {
  local python=${MASTIO_TEST_JUDGES_PYTHON:-$judges_repo/.test/venv-judges/bin/python}
  if [ ! -x "$python" ]; then
    echo "no judges' Python at $python: run ./test --prepare, or set MASTIO_TEST_JUDGES_PYTHON" >&2
    return 2
  fi
  echo "$python"
}

# The Go verifier, built when its source is newer.
judges_go() {
  local binary=$judges_repo/.test/bin/verify-go source=$judges_repo/judges/go new
  if [ ! -x "$binary" ] || [ "$source/verify.go" -nt "$binary" ]; then
    if ! command -v go >/dev/null; then
      echo "missing: go (Debian: golang-go)" >&2
      return 2
    fi
    mkdir -p "$(dirname "$binary")"
    # Tests run side by side: build aside, then move into place at once.
    new=$(mktemp "$binary.XXXXXX")
    (cd "$source" && GOFLAGS=-mod=mod GOPROXY=off go build -o "$new" .) >&2
    mv "$new" "$binary"
  fi
  echo "$binary"
}
