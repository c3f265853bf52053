#!/bin/sh
# Builds dist/felhom-agent.pyz and runs what needs it; `./build.sh help` lists the commands.
# The packages that they need are installed once, into virtual environments under .venv.
set -eu
# File modes are part of the archive.
umask 022
unset CDPATH SOURCE_DATE_EPOCH PYTHONHOME PYTHONPATH
cd -- "$(dirname -- "$0")"

pyz=dist/felhom-agent.pyz

usage() {
    cat <<'END'
usage: ./build.sh                   build dist/felhom-agent.pyz
       ./build.sh demo [--keep]     build it, have a simulated node report to the example hub and
                                    fall silent, and show the alarm; --keep then keeps the hub's
                                    page with three hosts, until Ctrl-C
       ./build.sh test [ARGUMENT]   build it and run the tests; arguments go to pytest

For work on the agent itself:
       ./build.sh lint              check style, types and shell scripts
       ./build.sh lab [ARGUMENT]    run the simulated node and hub until Ctrl-C
       ./build.sh soak [MINUTES]    run the agent against random faults
$PYTHON names the Python to use, 3.11 or newer; the default is python3.
END
}

die() {
    echo "build.sh: $*" >&2
    exit 1
}

check_python() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null ||
        die "$python not found: apt install python3 python3-venv, or set \$PYTHON"
    identity=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.base_prefix)') ||
        die "$python does not run"
    version=${identity%% *}
    case $version in
        [12].* | 3.? | 3.10) die "$python is Python $version, but 3.11 is needed: set \$PYTHON" ;;
    esac
}

# Makes $venv with the packages that the given file pins, unless it exists.
set_up() {
    venv=.venv/$version-$1
    made_for=$(echo "$identity" && cat "$2")
    if [ "$(cat "$venv/made-for" 2>/dev/null)" = "$made_for" ]; then
        return
    fi

    echo "setting up $venv (once)" >&2
    "$python" -m venv --clear "$venv" ||
        die "$python cannot make a virtual environment: apt install python3-venv"
    # Nothing is resolved and no package's own set-up code runs.
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-deps \
        --only-binary :all: --require-hashes -r "$2" || die "cannot install $2"

    # Last, so that an interrupted set-up is repeated.
    printf '%s\n' "$made_for" >"$venv/made-for"
}

# The archive is the same, byte for byte, wherever and whenever it is built:
# - shiv packs a folder with just these three files, since pip would add metadata with its path;
# - --reproducible fixes the time stamps;
# - --uncompressed, because zlib's output depends on its version;
# - shiv sorts what it packs, but adds its own start-up code in the order of the file system
#   (1.0.8, no option changes that), so that list is sorted here.
build() {
    set_up build tests/requirements-build.txt
    mkdir -p dist
    stage=$(mktemp -d "dist/stage.XXXXXX")
    install -m 644 felhom_agent.py felhom-agent.service agent.example.json "$stage"

    # With -I Python ignores its environment variables and the user's own packages on the node.
    "$venv/bin/python" -I - --site-packages "$stage" --entry-point felhom_agent:main \
        --python '/usr/bin/python3 -I' --reproducible --uncompressed \
        --output-file "$stage.pyz" <<'END'
import shiv.builder, shiv.cli

unsorted = shiv.builder.iter_package_files
shiv.builder.iter_package_files = lambda package: sorted(unsorted(package))
shiv.cli.main()
END

    rm -r "$stage"
    # Another build may be under way, so the file appears at once.
    mv "$stage.pyz" "$pyz"
    echo "$pyz: $(wc -c <"$pyz") bytes, sha256 $(sha256sum "$pyz" | cut -d ' ' -f 1)"
}

# Shows a report, and the alarm when the next one is missing.
demo() {
    work=$(mktemp -d) children=''
    trap 'trap "" HUP INT PIPE TERM; kill $children 2>/dev/null || :; wait; rm -rf "$work"' EXIT
    trap 'exit 130' HUP INT PIPE TERM

    # The node's systemctl, and the command with which the hub tells you.
    mkdir "$work/bin"
    cat >"$work/bin/systemctl" <<'END'
#!/bin/sh
echo active
END
    cat >"$work/bin/tell" <<'END'
#!/bin/sh
echo "ALARM: host $1 is $2"
END
    chmod 755 "$work/bin/systemctl" "$work/bin/tell"
    PATH=$work/bin:$PATH

    "$venv/bin/python" tests/lab.py --guests 3 >"$work/lab.env" 2>"$work/lab.log" &
    lab=$! children=$!
    # Its last line
    await "$work/lab.log" grep -q HUB_CA_FILE "$work/lab.env"

    # Instead of this machine's own configuration, if it has one.
    (umask 077 && echo '{}' >"$work/agent.json")
    # shellcheck source=/dev/null
    . "$work/lab.env"
    export FELHOM_AGENT_CONFIG="$work/agent.json" SHIV_ROOT="$work/shiv" FELHOM_AGENT_HUB_CA_FILE=''

    (umask 077 && echo '{"pve1": "key-1", "pve2": "key-2", "pve3": "key-3"}' >"$work/keys.json")
    # A host is overdue after 60 s - 58 s.
    start_hub --interval 60 --tolerance -58
    title 'pve1 reports: felhom-agent.pyz --selftest=hub'
    become_host 1
    "$venv/bin/python" -I "$pyz" --selftest=hub

    title 'pve1 falls silent. This hub waits 2 s for the next report, yours will wait 11 minutes:'
    await "$work/hub.log" grep -q '^ALARM' "$work/hub.log"
    grep '^ALARM' "$work/hub.log"
    echo '(The hub ran a command. Yours can send a mail or a push message, see docs/hub.md.)'

    if [ "${1-}" = --keep ]; then
        keep_page
    else
        title 'to see the hub with three hosts, run ./build.sh demo --keep'
    fi
}

# Runs the hub with a host that is overdue, one that is late, and one that reports.
keep_page() {
    become_host 2
    "$venv/bin/python" -I "$pyz" --selftest=hub >/dev/null 2>&1
    kill "$hub"
    wait "$hub" 2>/dev/null || :
    children=$lab

    # As if the last reports had come an hour and two minutes ago.
    "$venv/bin/python" - "$work/hub.sqlite3" <<'END'
import sqlite3, sys

update = "UPDATE hosts SET received_at = received_at - ?1, due_at = due_at - ?1 WHERE host_id = ?2"
with sqlite3.connect(sys.argv[1]) as database:
    database.executemany(update, [(3600, "pve1"), (120, "pve2")])
END

    start_hub --interval 60
    become_host 3
    "$venv/bin/python" -I "$pyz" &
    agent=$! children="$children $!"
    title "the hub's page: $FELHOM_AGENT_HUB_URL/ (Ctrl-C to stop)"
    echo 'pve1 is overdue, pve2 is late, pve3 reports every minute.'
    wait "$agent"
}

start_hub() {
    # That of a hub before it would say that this one is listening.
    rm -f "$work/hub.log"
    "$venv/bin/python" examples/hub.py --keys "$work/keys.json" --database "$work/hub.sqlite3" \
        --listen 127.0.0.1:0 --on-change "$work/bin/tell" "$@" >"$work/hub.log" 2>&1 &
    hub=$! children="$children $!"
    await "$work/hub.log" grep -q 'listening on' "$work/hub.log"
    url=$(sed -n 's|.*listening on \(http://[^/ ]*\).*|\1|p' "$work/hub.log")
    export FELHOM_AGENT_HUB_URL="$url"
}

become_host() {
    export FELHOM_AGENT_HUB_HOST_ID="pve$1" FELHOM_AGENT_HUB_API_KEY="key-$1"
}

title() {
    printf '\n== %s\n\n' "$1"
}

# Waits until a command succeeds, at most half a minute and only while the last child runs.
await() {
    log=$1 tries=300
    shift
    until "$@" 2>/dev/null; do
        tries=$((tries - 1))
        if [ "$tries" -eq 0 ] || ! kill -0 $! 2>/dev/null; then
            cat "$log" >&2
            die "the demo could not start"
        fi
        sleep 0.1
    done
}

lint() {
    "$venv/bin/python" -m ruff check .
    "$venv/bin/python" -m ruff format --check .
    "$venv/bin/python" -m mypy
    command -v shellcheck >/dev/null || die "needs shellcheck: apt install shellcheck"
    shellcheck build.sh .ci/run tests/systemd/boot tests/systemd/run tests/systemd/suite
}

command=${1-build}
if [ $# -gt 0 ]; then
    shift
fi

# What each command needs
case $command in
    build | demo | test | soak)
        check_python
        build
        ;;
    lint | lab)
        check_python
        ;;
    help | -h | --help)
        usage
        exit
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac

if [ "$command" = build ]; then
    exit
fi
set_up test tests/requirements.txt
case $command in
    demo) demo "$@" ;;
    lint) lint ;;
    test) FELHOM_AGENT_PYZ=$PWD/$pyz exec "$venv/bin/python" -m pytest "$@" ;;
    *) PYTHONPATH=$PWD exec "$venv/bin/python" "tests/$command.py" "$@" ;;
esac
