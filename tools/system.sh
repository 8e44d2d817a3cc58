#!/bin/sh
# Make sure that Debian packages are there: install them as root, else say the command. Missing ones are no error here: what needs them says so.
need=
for package in "$@"; do
    case $package in
        graphviz) command -v dot >/dev/null 2>&1 || need="$need graphviz" ;;
        chromium) command -v chromium >/dev/null 2>&1 || need="$need chromium" ;;
        npm) command -v npm >/dev/null 2>&1 || need="$need npm" ;;
        *) dpkg -s "$package" >/dev/null 2>&1 || need="$need $package" ;;
    esac
done
[ -z "$need" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing$need"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $need; } >"${TMPDIR:-/tmp}/apt-install.log" 2>&1 || { tail -n 5 "${TMPDIR:-/tmp}/apt-install.log"; echo "could not install$need"; }
else
    echo "missing Debian packages: run   sudo apt-get install$need"
fi
exit 0
