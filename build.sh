#!/bin/sh
# Builds dist/felhom-agent.pyz, and runs what needs it; `./build.sh help` lists the calls.  Every call first sets up what it
# needs: a virtual environment, .venv/3.11 for Python 3.11, with the packages that tests/requirements.txt pins.
set -eu
umask 022 # file modes stand in the archive
unset CDPATH SOURCE_DATE_EPOCH PYTHONHOME PYTHONPATH
cd -- "$(dirname -- "$0")"

pyz=dist/felhom-agent.pyz

usage() {
    cat <<'END'
usage: ./build.sh                   build dist/felhom-agent.pyz
       ./build.sh demo              build it and watch it send one report from a simulated node to a simulated hub
       ./build.sh test [ARGUMENT]   build it and run the tests; arguments go to pytest
       ./build.sh lint              check style, types and shell scripts
       ./build.sh lab [ARGUMENT]    the simulated node and hub, until Ctrl-C
       ./build.sh soak [MINUTES]    build it and run the endurance test
       ./build.sh bench [ARGUMENT]  build it and run the benchmarks
       ./build.sh help              this text
$PYTHON names the Python to use (3.11 or newer), else python3 it is.
END
}

die() {
    echo "build.sh: $*" >&2
    exit 1
}

set_up() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null ||
        die "$python not found: apt install python3 python3-venv, or name a Python 3.11 or newer in \$PYTHON"
    identity=$("$python" -c 'import sys; print("%d.%d %d" % sys.version_info[:3] + " " + getattr(sys, "base_prefix", ""))') ||
        die "$python does not run"
    version=${identity%% *}
    case $version in
        [12].* | 3.[0-9] | 3.10) die "$python is Python $version, this needs 3.11 or newer: name one in \$PYTHON" ;;
    esac
    venv=.venv/$version
    # The environment is made anew when its Python or a pin has changed, or when making it was interrupted: made-for comes last.
    made_for=$(echo "$identity" && cat tests/requirements.txt)
    if [ "$(cat "$venv/made-for" 2>/dev/null)" != "$made_for" ]; then
        "$python" -c 'import venv; from ensurepip import version' 2>/dev/null ||
            die "$python cannot make virtual environments: apt install python3-venv"
        echo "setting up $venv (once)" >&2
        "$python" -m venv --clear "$venv" || die "cannot make $venv"
        install_packages tests/requirements.txt
        printf '%s\n' "$made_for" >"$venv/made-for"
    fi
}

# Every package is pinned, so pip has nothing to resolve; and none is built here, so no package's own set-up code runs.
install_packages() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-deps --only-binary :all: -r "$1" ||
        die "cannot install the packages of $1 (pip says why above); only setting up needs the package index, building does not"
}

# The file is the same, byte for byte, wherever and whenever it is built:
# - what is packed is copied to an empty folder with a set mode, without pip, whose metadata would name this folder;
# - --reproducible fixes the time stamps;
# - --uncompressed, since one zlib compresses differently from another;
# - shiv packs its own files in the order in which the file system lists them, so they are sorted here.
build() {
    stage=$(mktemp -d "$PWD/$venv/stage.XXXXXX") # another build may be under way
    mkdir -p dist
    install -m 644 felhom_agent.py "$stage"
    # "python3 -I" lets neither Python's environment variables nor a user's own packages into the process that holds the secrets.
    "$venv/bin/python" -I -c '
import shiv.builder, shiv.cli
package_files = shiv.builder.iter_package_files
shiv.builder.iter_package_files = lambda package: sorted(package_files(package), key=lambda entry: entry[1])
shiv.cli.main()
' --site-packages "$stage" --entry-point felhom_agent:main --python '/usr/bin/python3 -I' \
        --reproducible --uncompressed --output-file "$pyz.$$"
    rm -rf "$stage"
    mv "$pyz.$$" "$pyz"
    echo "$pyz: $(wc -c <"$pyz") bytes, sha256 $(sha256sum "$pyz" | cut -d ' ' -f 1)"
}

demo() {
    lab='' agent='' work=$(mktemp -d)
    trap 'trap "" HUP INT PIPE TERM; kill $lab $agent 2>/dev/null || :; wait; rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT PIPE TERM

    "$venv/bin/python" tests/lab.py --guests 3 --folder "$work/certificates" \
        --env-file "$work/lab.env" --report-file "$work/report.json" >"$work/lab.log" 2>&1 &
    lab=$!
    await "$work/lab.env" "$lab" "$work/lab.log" "the simulated node and hub"
    # Nothing from here gets to the agent, neither HOME, which a service does not have, nor this machine's own configuration.
    echo '{}' >"$work/agent.json"
    chmod 600 "$work/agent.json"
    # shellcheck disable=SC2016 # the inner shell expands these
    env -i PATH="$PATH" SHIV_ROOT="$work/shiv" FELHOM_AGENT_CONFIG="$work/agent.json" \
        sh -c '. "$1" && exec "$2" -I "$3"' sh "$work/lab.env" "$venv/bin/python" "$pyz" 2>"$work/agent.log" &
    agent=$!
    await "$work/report.json" "$agent" "$work/agent.log" "the first report"
    kill -TERM "$agent"
    status=0
    wait "$agent" || status=$?
    agent=''

    printf '\n== the log of the agent\n\n'
    cat "$work/agent.log"
    printf '\n== what the hub received\n\n'
    cat "$work/report.json"
    printf '\n== stopped by SIGTERM with exit status %s\n' "$status"
    return "$status"
}

# Waits for file $1 as long as process $2 lives and half a minute at most; $3 is that process's output, $4 what is awaited.
await() {
    tries=300
    until [ -e "$1" ]; do
        tries=$((tries - 1))
        if [ "$tries" -eq 0 ] || ! kill -0 "$2" 2>/dev/null; then
            cat "$3" >&2
            die "$4 did not come"
        fi
        sleep 0.1
    done
}

lint() {
    "$venv/bin/python" -m ruff check .
    "$venv/bin/python" -m ruff format --check .
    "$venv/bin/python" -m mypy
    set -- build.sh .ci/run
    [ ! -e tests/systemd/run ] || set -- "$@" tests/systemd/run
    if command -v shellcheck >/dev/null; then shellcheck "$@"; else echo "no shellcheck here: shell scripts are not checked" >&2; fi
}

call=${1-build}
[ $# -eq 0 ] || shift
case $call in
    build | demo | test | lint | lab | soak | bench) set_up ;;
    help | -h | --help) usage && exit ;;
    *) usage >&2 && exit 2 ;;
esac
case $call in
    lint | lab) ;;
    *) build ;;
esac
case $call in
    demo) demo ;;
    lint) lint ;;
    test) FELHOM_AGENT_PYZ=$PWD/$pyz exec "$venv/bin/python" -m pytest "$@" ;;
    lab | soak) PYTHONPATH=$PWD exec "$venv/bin/python" "tests/$call.py" "$@" ;;
    bench)
        install_packages tests/requirements-bench.txt
        exec "$venv/bin/python" tests/bench.py "$@"
        ;;
esac
