# Says what a program that was started by a login finds: run by both servers, compared by test_as_openssh.py.
# A POSIX shell script, read by `.` or on a command line; every line is "key<TAB>value".
p() { printf '%s\t%s\n' "$1" "$2"; }
p argv0 "$0"
p cmdline "$(tr '\0' '|' </proc/$$/cmdline)"
p uid "$(id -u)"
p gid "$(id -g)"
p groups "$(id -G | tr ' ' '\n' | sort -n | tr '\n' ' ')"
p name "$(id -un)"
p umask "$(umask)"
p cwd "$(pwd)"
p tty "$(tty | sed 's/[0-9]*$/N/')"
set -- $(sed 's/^.*) //' /proc/$$/stat)
[ "$3" = $$ ] && p group-leader yes || p group-leader no
[ "$4" = $$ ] && p session-leader yes || p session-leader no
[ "$5" != 0 ] && p controlling-terminal yes || p controlling-terminal no
[ "$6" = "$3" ] && p foreground yes || p foreground no
p nice "${17}"
grep -E '^(Sig(Blk|Ign)|Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|Seccomp|Groups|Uid|Gid)[[:space:]:]' /proc/self/status |
  while read -r key value; do p "status:${key%:}" "$value"; done
p oom "$(cat /proc/self/oom_score_adj)"
while read -r line; do
  name=$(printf %s "$line" | cut -c 1-25 | sed 's/ *$//')
  p "limit:$name" "$(printf %s "$line" | cut -c 27-)"
done </proc/self/limits
# By the shell itself: a pipe to another program would come and go while one looks. One is the folder being read.
set -- /proc/$$/fd/*
open=
for file in "$@"; do open="$open ${file##*/}"; done
p fds "$open"
p loginuid "$(cat /proc/self/loginuid 2>/dev/null)"
p stdin "$(readlink /proc/self/fd/0 | sed 's/[0-9][0-9]*/N/g')"
p stdout-of-shell "$(readlink /proc/$$/fd/1 | sed 's/[0-9][0-9]*/N/g')"
p stderr-of-shell "$(readlink /proc/$$/fd/2 | sed 's/[0-9][0-9]*/N/g')"
if [ "$(tty)" != "not a tty" ]; then
  p stty "$(stty -a | tr '\n' ' ')"
  p tty-mode "$(stat -c '%a %U %G' "$(tty)")"
fi
env | sort | while IFS= read -r line; do
  case $line in
    *=*) p "env:${line%%=*}" "${line#*=}" ;;
  esac
done
