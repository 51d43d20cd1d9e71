#!/bin/sh
# Installs comet into /opt/comet and has systemd run it; run it again to update: what is right already is left alone, and a
# running service is reloaded, or restarted where its unit or its packages changed. See README.md beside this file.
#
#   install.sh [--dry-run] [--tune] [--wheels DIR]
#                                  --tune: kernel settings for very many clients as well (90-comet.conf), and no connection
#                                          tracking of comet's ports (comet.nft); they concern the whole machine
#                                  DIR: packages from there, and from no index (a machine without network)
#   install.sh --uninstall [--purge]
#                                  --purge: settings, key and subscriptions too
#
# Needs root, systemd, and Python 3.11 or newer with venv (Debian: python3-venv). Which index the packages come from is pip's
# own configuration.
set -eu

SOURCE=$(cd "$(dirname "$0")/.." && pwd)
TARGET=/opt/comet
SETTINGS=/etc/comet
UNITS=/etc/systemd/system
SYSCTL=/etc/sysctl.d/90-comet.conf
DRY=
TUNE=
WHEELS=
UNINSTALL=
PURGE=
DONE=0

say() { printf '%s\n' "$*"; }
fail() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

# WHAT COMMAND...: something that changes the machine: said, and done unless this is a dry run.
do_it() {
    DONE=$((DONE + 1))
    what=$1
    say "${DRY:+would: }$what"
    shift
    [ -n "$DRY" ] || "$@" || fail "could not $what; what is wrong should stand above. Mend it and run this again."
}

# SOURCE TARGET MODE: a file, where it is missing or differs; whether it was
put() {
    if [ -f "$2" ] && cmp -s "$1" "$2"; then return 1; fi
    do_it "write $2" install -D -m "$3" "$1" "$2"
}

# NAME: a folder or file of the code, whole, swapped in; whether it had changed
put_code() {
    if [ -e "$TARGET/$1" ] && diff -rq -x __pycache__ "$SOURCE/$1" "$TARGET/$1" >/dev/null 2>&1; then return 1; fi
    do_it "write $TARGET/$1" swap_in "$1"
}

# (chains of &&, here and below: in a function whose success is asked for, set -e is off)
swap_in() {
    rm -rf "$TARGET/.new" "$TARGET/.old" &&
        mkdir -p "$TARGET/.new" "$TARGET/.old" &&
        cp -R "$SOURCE/$1" "$TARGET/.new/" &&
        find "$TARGET/.new" -name __pycache__ -prune -exec rm -rf {} + &&
        chmod -R u=rwX,go=rX "$TARGET/.new/$1" &&
        { [ ! -e "$TARGET/$1" ] || mv "$TARGET/$1" "$TARGET/.old/"; } &&
        mv "$TARGET/.new/$1" "$TARGET/$1" &&
        rm -rf "$TARGET/.new" "$TARGET/.old"
}

# Anew, since what is gone from the requirements must go too, and one of another Python can't be mended; and aside, since a
# service may be running in the old one. (Its scripts don't survive the move; `python -m` does.)
make_environment() {
    rm -rf "$TARGET/.venv" &&
        "$PYTHON" -m venv "$TARGET/.venv" &&
        "$TARGET/.venv/bin/python" -m pip install --quiet --disable-pip-version-check ${WHEELS:+--no-index --find-links "$WHEELS"} \
            -r "$TARGET/deploy/requirements.txt" &&
        cp "$TARGET/deploy/requirements.txt" "$TARGET/.venv/.made-of" &&
        rm -rf "$TARGET/venv" &&
        mv "$TARGET/.venv" "$TARGET/venv"
}

make_key() {
    install -d -m 0755 "$SETTINGS" &&
        key=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') &&
        [ ${#key} = 64 ] &&
        (umask 077 && printf '%s\n' "$key" >"$SETTINGS/publish-key")
}

# A queue a worker, on the one port: COMET_WORKERS=auto is one worker a core at least.
queue_file() {
    address=$(sed -n 's/^ListenStream=//p' "$SOURCE/deploy/comet.socket")
    say "# Written by install.sh: as many sockets as there are cores, on the one port, so that each worker has its own queue (see"
    say "# comet.socket). Another address: systemctl edit comet.socket, as many lines."
    say "[Socket]"
    say "ReusePort=yes"
    say "ListenStream="
    for _ in $(seq "$(nproc)"); do say "ListenStream=$address"; done
}

# FILE: memory.conf for a machine whose /proc/meminfo is FILE. All in MiB, and in whole 64: the kernel takes a little more or less at each
# boot, which must not look like another machine.
memory_file() {
    total=$(($(sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1/p' "$1") / 1024))
    rest=$((total / 8))
    [ "$rest" -ge 256 ] || rest=256
    most=$(((total - rest) / 64 * 64))
    [ "$most" -ge 256 ] || most=256
    say "# Written by install.sh: what comet may take of this machine's memory. The rest is nginx', sshd's and everybody else's: an eighth,"
    say "# and 256 MiB at least, which is why it is no percentage. It counts what the kernel keeps for the service's connections as well."
    say "# Another share: systemctl edit comet (MemoryHigh=, MemoryMax=)."
    say "[Service]"
    say "# From here on the kernel takes back what it can (pages of files), and who allocates waits for it."
    say "MemoryHigh=$((most / 16 * 15))M"
    say "# Here it kills a process of the service, and none of anybody else; its supervisor replaces it."
    say "MemoryMax=${most}M"
}

load_notrack() {
    systemctl --quiet enable comet-notrack.service && systemctl restart comet-notrack.service
}

# NAME: what the kernel has, a space between its numbers; nothing where it has no such setting
value_of() { tr -s '\t' ' ' 2>/dev/null <"/proc/sys/$(printf '%s' "$1" | tr . /)" || :; }

# NAME: what it was before the first --tune, as that has noted it
value_before() {
    if grep -q "^# $1 was: " "$SYSCTL" 2>/dev/null; then sed -n "s/^# $1 was: //p" "$SYSCTL"; else value_of "$1"; fi
}

# NAME VALUE: whether more is better, and the kernel has more already: that must not be made less. Of several numbers the last
# one counts, which is the most.
has_more() {
    case $1 in
        fs.* | vm.* | net.core.* | net.ipv4.tcp_max_syn_backlog | net.ipv4.tcp_mem | net.ipv4.tcp_rmem | net.ipv4.tcp_wmem) ;;
        *) return 1 ;;
    esac
    have=$(value_of "$1")
    [ -n "$have" ] && [ "${have##* }" -gt "${2##* }" ]
}

# LIST LIST: ports and ranges of both, as one list in order
merge_ports() {
    printf '%s,%s\n' "$1" "$2" | tr ',' '\n' | awk -F- '
        NF { for (port = $1 + 0; port <= $NF + 0; port++) reserved[port] = 1 }
        END {
            for (port = 0; port < 65536; port++) {
                if (!(port in reserved)) continue
                first = port
                while ((port + 1) in reserved) port++
                list = list (list == "" ? "" : ",") first (port > first ? "-" port : "")
            }
            print list
        }'
}

# 90-comet.conf for this machine: what has more stays, ports that are reserved stay so, and each line is preceded by what it was
sysctl_file() {
    while IFS= read -r line; do
        name=${line%% = *} value=${line#* = }
        case $line in
            '#'* | '') say "$line"; continue ;;
            net.ipv4.ip_local_reserved_ports*) value=$(merge_ports "$(value_of "$name")" "$value") ;;
        esac
        if has_more "$name" "$value"; then
            say "# (not set, here it is more already) $line"
        else
            say "# $name was: $(value_before "$name")"
            say "$name = $value"
        fi
    done <"$SOURCE/deploy/90-comet.conf"
}

# NAME VALUE; a container may not set some of them: they are its host's
set_kernel() {
    sysctl --quiet --write "$1=$2" 2>/dev/null || say "  it could not be set here (a container?): set it on the host"
}

tune() {
    kernel=$(mktemp)
    sysctl_file >"$kernel"
    if put "$kernel" "$SYSCTL" 0644; then
        while IFS= read -r line; do
            case $line in '#'* | '') continue ;; esac
            name=${line%% = *} value=${line#* = }
            now=$(value_of "$name")
            [ "$now" = "$value" ] || do_it "set $name: ${now:-nothing} -> $value" set_kernel "$name" "$value"
        done <"$kernel"
    fi
    rm -f "$kernel"
    if [ ! -x /usr/sbin/nft ]; then
        say "there is no nft: connections to comet are tracked if anything on this machine tracks (apt-get install nftables)"
        return
    fi
    # yours from then on, as comet.env: which ports it names is this machine's matter
    [ -f "$SETTINGS/comet.nft" ] || do_it "write $SETTINGS/comet.nft" install -D -m 0644 "$SOURCE/deploy/comet.nft" "$SETTINGS/comet.nft"
    if put "$SOURCE/deploy/comet-notrack.service" "$UNITS/comet-notrack.service" 0644; then
        do_it "systemctl daemon-reload" systemctl daemon-reload
    elif systemctl --quiet is-active comet-notrack.service 2>/dev/null; then
        return
    fi
    do_it "enable and load comet-notrack.service: connections to the ports in $SETTINGS/comet.nft, tracked -> not tracked" load_notrack
}

# The URL of Redis, if there is one, is a credential of the service: its file is for root alone.
put_backplane() {
    drop_in=$UNITS/comet.service.d/backplane.conf
    if [ -s "$SETTINGS/backplane" ]; then
        mode=$(stat -c %a "$SETTINGS/backplane")
        [ "$mode" = 600 ] || do_it "let root alone read $SETTINGS/backplane: $mode -> 600" chmod 600 "$SETTINGS/backplane"
        if put "$SOURCE/deploy/backplane.conf" "$drop_in" 0644; then units=1; fi
    elif [ -f "$drop_in" ]; then
        do_it "remove $drop_in: there is no $SETTINGS/backplane" rm "$drop_in"
        units=1
    fi
}

install_all() {
    # the machine's own: one in somebody's home (pyenv) is hidden from the service
    PYTHON=/usr/bin/python3
    [ -x "$PYTHON" ] || fail "$PYTHON is missing: apt-get install python3-venv"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "comet needs Python 3.11 or newer; $PYTHON is older"
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON has no venv: apt-get install python3-venv"
    command -v systemctl >/dev/null || fail "there is no systemd here; deploy/Dockerfile is for containers"
    [ -n "$DRY" ] || [ "$(id -u)" = 0 ] || fail "this changes the machine: run it as root, or with --dry-run"

    code='' units='' port='' packages=''
    if [ "$SOURCE" = "$TARGET" ]; then
        say "run from $TARGET itself: the code is as it is"
    else
        for name in app.py comet handlers deploy README.md CHANGELOG.md LICENSE; do
            if put_code "$name"; then code=1; fi
        done
    fi
    if ! cmp -s "$SOURCE/deploy/requirements.txt" "$TARGET/venv/.made-of" || ! "$TARGET/venv/bin/python" -c '' 2>/dev/null; then
        do_it "make a virtual environment, $TARGET/venv" make_environment
        packages=1
    fi
    # now: the service itself may not write there
    if [ -n "$code$packages" ]; then do_it "compile the code" "$TARGET/venv/bin/python" -m compileall -q "$TARGET/app.py" "$TARGET/comet" "$TARGET/handlers"; fi

    [ -s "$SETTINGS/publish-key" ] || do_it "make a publish key, $SETTINGS/publish-key" make_key
    [ -f "$SETTINGS/comet.env" ] || do_it "write $SETTINGS/comet.env" install -D -m 0644 "$SOURCE/deploy/comet.env" "$SETTINGS/comet.env"

    if put "$SOURCE/deploy/comet.service" "$UNITS/comet.service" 0644; then units=1; fi
    if put "$SOURCE/deploy/comet.socket" "$UNITS/comet.socket" 0644; then units=1 port=1; fi
    queues=$(mktemp)
    queue_file >"$queues"
    if put "$queues" "$UNITS/comet.socket.d/10-workers.conf" 0644; then units=1 port=1; fi
    rm -f "$queues"
    version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
    if [ "${version:-0}" -ge 254 ]; then
        if put "$SOURCE/deploy/back-off.conf" "$UNITS/comet.service.d/back-off.conf" 0644; then units=1; fi
    fi
    memory=$(mktemp)
    memory_file /proc/meminfo >"$memory"
    if put "$memory" "$UNITS/comet.service.d/memory.conf" 0644; then units=1; fi
    rm -f "$memory"
    put_backplane

    [ -z "$units" ] || do_it "systemctl daemon-reload" systemctl daemon-reload
    [ -z "$TUNE" ] || tune
    if ! systemctl --quiet is-enabled comet.socket comet.service 2>/dev/null; then
        do_it "enable comet.socket and comet.service" systemctl --quiet enable comet.socket comet.service
    fi
    if [ -n "$port" ] && systemctl --quiet is-active comet.socket 2>/dev/null; then
        do_it "stop comet.socket and comet.service: the socket is to be another" systemctl stop comet.socket comet.service
    fi
    if [ -n "$port" ] || ! systemctl --quiet is-active comet.service 2>/dev/null; then
        do_it "start comet.socket and comet.service" systemctl start comet.socket comet.service
    elif [ -n "$units$packages" ]; then
        do_it "restart comet.service" systemctl restart comet.service
    elif [ -n "$code" ]; then
        do_it "reload comet.service" systemctl reload comet.service
    fi

    if [ "$DONE" = 0 ]; then say "nothing to do: comet is installed, as it is here"; return; fi
    [ -z "$DRY" ] || { say "nothing was changed"; return; }
    say
    say "comet is installed. It listens where $UNITS/comet.socket says (127.0.0.1:8000); the next steps are in $TARGET/deploy/README.md"
    say "  its state      systemctl status comet; journalctl -u comet"
    say "  settings       $SETTINGS/comet.env"
    say "  publish key    $SETTINGS/publish-key"
    say "  what this machine allows   cd $TARGET && venv/bin/python -m comet check --clients 1000000"
    [ -n "$TUNE" ] || say "  kernel settings     none was touched; deploy/install.sh --tune --dry-run says which very many clients take"
}

uninstall_all() {
    [ -n "$DRY" ] || [ "$(id -u)" = 0 ] || fail "this changes the machine: run it as root, or with --dry-run"
    for unit in comet.socket comet.service comet-notrack.service; do
        if [ -e "$UNITS/$unit" ]; then do_it "stop and disable $unit" systemctl --quiet disable --now "$unit"; fi
    done
    tuned=$(grep '^# net.* was: \|^# vm.* was: \|^# fs.* was: ' "$SYSCTL" 2>/dev/null || :)
    for path in "$UNITS/comet.service" "$UNITS/comet.socket" "$UNITS/comet-notrack.service" "$UNITS/comet.service.d/back-off.conf" \
        "$UNITS/comet.service.d/backplane.conf" "$UNITS/comet.service.d/memory.conf" "$UNITS/comet.socket.d/10-workers.conf" "$SETTINGS/comet.nft" "$SYSCTL" "$TARGET"; do
        if [ -e "$path" ]; then do_it "remove $path" rm -rf "$path"; fi
    done
    # what `systemctl edit` has put there is yours
    for path in "$UNITS/comet.service.d" "$UNITS/comet.socket.d"; do
        if [ -z "$DRY" ] && [ -d "$path" ]; then rmdir --ignore-fail-on-non-empty "$path"; fi
    done
    if [ "$DONE" != 0 ]; then do_it "systemctl daemon-reload" systemctl daemon-reload; fi
    if [ -n "$PURGE" ]; then
        for path in "$SETTINGS" /var/lib/comet /var/lib/private/comet; do
            if [ -e "$path" ] || [ -L "$path" ]; then do_it "remove $path" rm -rf "$path"; fi
        done
    fi
    if [ "$DONE" = 0 ]; then say "nothing to do: comet is not installed"; return; fi
    [ -z "$DRY" ] || { say "nothing was changed"; return; }
    [ -n "$PURGE" ] || say "kept: $SETTINGS (settings, key), /var/lib/comet (subscriptions); --purge removes them"
    if [ -n "$tuned" ]; then
        say "kernel settings stay as they are until the machine restarts. Before --tune:"
        say "$tuned" | sed 's/^# \(.*\) was: /  \1 = /'
    fi
}

while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) DRY=1 ;;
        --tune) TUNE=1 ;;
        --uninstall) UNINSTALL=1 ;;
        --purge) PURGE=1 ;;
        --wheels)
            if [ $# -lt 2 ] || [ ! -d "$2" ]; then fail "--wheels needs a folder of packages"; fi
            WHEELS=$(cd "$2" && pwd)
            shift ;;
        *) sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    shift
done
[ -z "$PURGE" ] || [ -n "$UNINSTALL" ] || fail "--purge goes with --uninstall"
[ -z "$TUNE" ] || [ -z "$UNINSTALL" ] || fail "--tune does not go with --uninstall"
if [ -n "$UNINSTALL" ]; then uninstall_all; else install_all; fi
