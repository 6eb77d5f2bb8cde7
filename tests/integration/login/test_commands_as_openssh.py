"""The same commands through OpenSSH's sshd and through Postern, recorded and not: output, errors, status, and whether the client ends, are equal, or the
command's name is a row of docs/DIFFERENCES.md (way `commands`), with the reason. A row that no longer describes a difference fails, too.

A case is a name and a command; CASES says how it runs:

    exec        ssh host COMMAND, stdin /dev/null          tty        ssh -tt host COMMAND, on a terminal of ours
    shell       ssh -T host <TEXT                          typed      ssh host on a terminal: [(wait for, send), …]
    stdin=…     bytes for exec's input                     held       HOME/fifo has no writer until the client has ended, or has not for a while
"""
from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import platform
import pwd
import re
import subprocess
import time
from dataclasses import dataclass, field

import pytest

from harness import SLACK, Terminal, new_stack, wait_until
from login.sshd import Sshd
from login.test_as_openssh import listed

pytestmark = pytest.mark.needs_root

PROMPT = r"[$#] $"
WAITS_FOR_A_KEY = {"x86_64": ("270", "0"), "aarch64": ("72", "63")}  # pselect6, read
CAT, READY = "sh -c 'echo re\"\"ady; exec cat'\r", "\rready\r\n"  # so that it is known when it reads
ALL_BYTES = bytes(range(256))


@dataclass
class Case:
    command: str | None
    way: str = "exec"
    stdin: bytes | None = None
    typed: list = field(default_factory=list)
    env: dict = field(default_factory=dict)   # of the client, all of it sent
    options: tuple = ()                       # of the client
    arguments: tuple = ()                     # likewise
    greeted: bool = False                     # what comes before the first prompt is compared, too
    numbers: bool = False                     # process ids and the like: the same where they were the same
    held: bool = False
    jobs: bool = False                        # HOME/job holds a process id: does it live on?
    around: str = 'exec "$@"'                 # a local shell command that runs the client
    rows: int = 24
    cols: int = 80


def exec_(command, **more):
    return Case(command, **more)


def tty(command, **more):
    return Case(command, way="tty", **more)


def shell(text, **more):
    return Case(None, way="shell", stdin=text.encode(), **more)


def typed(*steps, **more):
    return Case(None, way="typed", typed=list(steps), **more)


class AtRest(str):
    """Typed only once the shell sleeps in its wait for the next key. readline looks for signals and then waits: one that comes between the two it
    keeps until another key comes, under any sshd."""


RUNS = "echo $! >~/job; until grep -q cat /proc/$!/comm; do sleep 0.05; done; echo started"  # the job is what it will be
SELF = "ps -o pid,ppid,pgid,sid,tpgid,tty,stat,nice,args -p $$"
STATUS = "grep -E '^(Umask|State|Uid|Gid|Groups|Sig|Shd|Cap|NoNewPrivs|Seccomp|Speculation|THP|CoreDumping|Cpus_allowed_list)' /proc/self/status"

CASES: dict[str, Case] = {
    # who and where
    "id": exec_("id"),
    "groups, as names and numbers": exec_("groups; id -G; id -gn"),
    "environment": exec_("env | sort"),
    "environment with a terminal": tty("env | sort"),
    "environment of a shell without a terminal": shell("env | sort\n"),
    "exported and own variables of the shell": exec_("set | cut -d= -f1 | sort"),
    "limits, soft": exec_("ulimit -a"),
    "limits, hard": exec_("ulimit -Ha"),
    "limits of the process": exec_("cat /proc/self/limits"),
    "umask": exec_("umask; umask -S"),
    "mode of a new file and folder": exec_("cd; touch f.$$; mkdir d.$$; stat -c '%a %U %G %F' f.$$ d.$$; rm -r f.$$ d.$$"),
    "no terminal": exec_("tty; echo $?"),
    "a terminal": tty("tty; echo $?; test -t 0 -a -t 1 -a -t 2; echo $?"),
    "no /dev/tty without a terminal": exec_("read x </dev/tty; echo $?"),
    "/dev/tty is the terminal": tty("echo hello >/dev/tty; stty size </dev/tty"),
    "owner and mode of the terminal": tty('stat -c "%U %G %a" "$(tty)"; mesg'),
    "locale": exec_("locale"),
    "locale with LANG sent": exec_("locale", env={"LANG": "C.UTF-8"}),
    "locale with LC_ALL and LC_MESSAGES sent": exec_("locale", env={"LANG": "C.UTF-8", "LC_ALL": "C", "LC_MESSAGES": "POSIX"}),
    "variables that are not accepted": exec_("echo [$FOO] [$EDITOR] [$POSTERN_TEST_X]", env={"FOO": "1", "EDITOR": "vi", "POSTERN_TEST_X": "yes"}),
    "a variable with everything in it": exec_("printf %s \"$POSTERN_TEST_X\" | od -c", env={"POSTERN_TEST_X": "a b\tc\n\"'\\$(id)`id`;é"}),
    "an empty variable": exec_("env | grep -c ^POSTERN_TEST_X=$", env={"POSTERN_TEST_X": ""}),
    "folder": exec_("pwd; pwd -P; echo ~; echo $HOME $OLDPWD"),
    "unset HOME": exec_("unset HOME; echo ~; cd; echo $?; pwd"),
    "the account as the system has it": exec_('getent passwd "$USER" | cut -d: -f1,3,4,6,7; id -un; logname; echo $LOGNAME'),
    "logname with a terminal": tty("logname"),
    "who am i": exec_("who am i; who -m; echo $?"),
    "who am i with a terminal": tty("who am i | sed -E 's/ +[0-9-]{10} [0-9:]{5}//'; echo ${PIPESTATUS[0]}"),
    "last login of this user, as the records say": tty('last -1 "$USER" 2>&1 | head -1 | cut -c1-38; lastlog -u "$USER" 2>&1 | tail -1 | cut -c1-40'),
    "time zone": exec_("date +%Z%z; echo $TZ"),
    # the process
    "ps of itself": exec_(SELF, numbers=True),
    "ps of itself with a terminal": tty(SELF, numbers=True),
    "ps of itself in a shell without a terminal": shell(SELF + "\n", numbers=True),
    "name and arguments of the shell": exec_("echo $0 $# $-; shopt login_shell; tr '\\0' '|' </proc/$$/cmdline; echo $SHLVL"),
    "name and arguments of a login shell": shell("echo $0 $#; shopt login_shell; tr '\\0' '|' </proc/$$/cmdline; echo $SHLVL\n"),
    "descriptors": exec_("ls /proc/self/fd | tr '\\n' ' '"),
    "descriptors with a terminal": tty("ls -l /proc/self/fd | sed -E 's/.* ([0-9]+ -> )/\\1/; /->/!d; /\\/proc/d'", numbers=True),
    "kinds of stdin, stdout and stderr": exec_("for i in 0 1 2; do stat -L -c %F /proc/$$/fd/$i; done"),
    "access of stdin, stdout and stderr": exec_("for i in 0 1 2; do (test -r /dev/fd/$i; echo $?; grep flags /proc/$$/fdinfo/$i); done"),
    "signals, capabilities and so on": exec_(STATUS),
    "signals, capabilities and so on with a terminal": tty(STATUS),
    "traps at the start": exec_("trap; trap -p PIPE HUP TERM INT CHLD"),
    "nice, ionice, scheduler": exec_("nice; ionice; chrt -p $$; taskset -p $$", numbers=True),
    "oom score, audit": exec_("cd /proc/self; cat oom_score_adj loginuid; echo; cat sessionid; echo; cat coredump_filter timerslack_ns personality 2>&1"),
    "cgroups": exec_("cat /proc/self/cgroup"),
    "name spaces but the mounts'": exec_("cd /proc/self/ns; readlink cgroup ipc net pid user uts time"),
    "exec -a": exec_("exec -a renamed sh -c 'tr \"\\0\" \"|\" </proc/$$/cmdline'"),
    "aliases and functions": exec_("alias; declare -F; type -t ls"),
    "files that bash reads": exec_("echo $READ_BASHRC $READ_PROFILE"),
    "files that a login shell reads": shell("echo $READ_BASHRC $READ_PROFILE\n"),
    # ends
    **{f"exit {n}": exec_(f"exit {n}") for n in (0, 1, 2, 3, 42, 126, 127, 128, 129, 137, 200, 254, 255)},
    "exit 255 with a terminal": tty("exit 255"),
    "exit 300": exec_("perl -e 'exit 300'"),
    "exit -1": exec_("exit -1"),
    "a command that is not there": exec_("no-such-command-here"),
    "a file that may not be executed": exec_("/etc/passwd"),
    "a folder as a command": exec_("/tmp"),
    "a mistake of syntax": exec_("if then; fi ) ("),
    "an unknown interpreter": exec_("printf '#!/no/such/program\\n' >x.$$; chmod +x x.$$; ./x.$$; r=$?; rm x.$$; exit $r", numbers=True),
    **{f"kill -{s} itself": exec_(f"kill -{s} $$; echo survived") for s in ("HUP", "INT", "QUIT", "ABRT", "KILL", "SEGV", "PIPE", "TERM", "USR1", "ALRM", "XCPU", "RTMIN")},
    "kill -TERM itself with a terminal": tty("kill -TERM $$; echo survived"),
    "a child that dies of a signal": exec_("sh -c 'kill -SEGV $$'; echo $?; sh -c 'kill -PIPE $$'; echo $?; (kill -9 $BASHPID); echo $?", numbers=True),
    "abort with a core": exec_("ulimit -c unlimited; cd /tmp; sh -c 'kill -ABRT $$'; echo $?; rm -f core core.*", numbers=True),
    "trap of HUP, TERM, PIPE": exec_("trap 'echo h' HUP; trap 'echo t' TERM; trap 'echo p' PIPE; kill -HUP $$; kill -TERM $$; kill -PIPE $$; exit 5"),
    "trap of EXIT": exec_("trap 'echo bye' EXIT; exit 6"),
    "timeout": exec_("timeout 0.2 cat /dev/zero | wc -c >/dev/null; echo ${PIPESTATUS[0]}"),
    "stopped by itself and continued": exec_("(sleep 0.2; kill -CONT $$) & kill -STOP $$; echo continued"),
    # input
    "/dev/stdin, /dev/stdout, /dev/stderr": exec_("cat /dev/stdin; echo out >/dev/stdout; echo err >/dev/stderr; echo both | tee /dev/stderr; echo $?", stdin=b"in\n"),
    "/dev/stdin, /dev/stdout, /dev/stderr with a terminal": tty("echo out >/dev/stdout; echo err >/dev/stderr; echo both | tee /dev/stderr; echo $?"),
    "owners of stdin, stdout and stderr": exec_("stat -L -c '%U %G %a' /dev/fd/0 /dev/fd/1 /dev/fd/2; for i in 0 1 2; do stat -L -c '%U %G %a' /proc/$$/fd/$i; done"),
    "no input": exec_("cat; echo $?"),
    "some input": exec_("cat; echo end", stdin=b"one\ntwo\nwithout end of line"),
    "binary input and output": exec_("cat", stdin=ALL_BYTES * 100),
    "binary output": exec_("printf '" + "".join(f"\\x{n:02x}" for n in range(256)) + "'"),
    "binary output with a terminal": tty("stty raw; printf '" + "".join(f"\\x{n:02x}" for n in range(256)) + "'"),
    "line ends with a terminal": tty("printf 'a\\nb\\r\\nc\\td\\b\\a\\n'"),
    "large input": exec_("sha256sum", stdin=ALL_BYTES * 20_000),
    "large input to what does not read": exec_("true", stdin=ALL_BYTES * 20_000),
    "large input to what reads a little": exec_("head -c 10 | od -c", stdin=ALL_BYTES * 20_000),
    "large input to what closes it": exec_("exec <&-; sleep 0.3; echo alive; exit 3", stdin=ALL_BYTES * 20_000),
    "input after what nobody read": exec_("sleep 0.3; wc -c", stdin=ALL_BYTES * 4000),
    "input comes back": exec_("cat", stdin=ALL_BYTES * 20_000),
    "input for a terminal from a pipe": exec_("read x; echo got $x", arguments=("-tt",), stdin=b"hello\n"),
    "the end of a pipe is none for a terminal": exec_("timeout 1 cat; echo $?", arguments=("-tt",)),
    "client without stdin (-n)": exec_("cat; echo $?", arguments=("-n",), stdin=b"not for you"),
    "client with closed stdin": exec_("cat; echo $?", around='exec "$@" <&-'),
    "client with closed stdout": exec_("echo x; echo y >&2; sleep 0.1; echo z; exit 4", around='exec "$@" >&-'),
    "client with closed stderr": exec_("echo x; echo y >&2; exit 4", around='exec "$@" 2>&-'),
    "program closes its output": exec_("echo before; exec >&- 2>&-; sleep 0.2; exit 7"),
    "program closes its input": exec_("exec <&-; cat; echo $?"),
    "shell on stdin": shell("echo one\nfalse\necho $?\nexit 9\necho never\n"),
    "shell on stdin that ends": shell("echo one\nfalse"),
    "shell on stdin with a mistake": shell("fi\necho after $?\n"),
    "shell that reads its own input": shell("read x\nthe line\necho got $x\n"),
    "a here document": exec_("cat <<X\nhello $USER\nX\necho end"),
    # output
    "both streams": exec_("echo o1; echo e1 >&2; echo o2; echo e2 >&2; exit 8"),
    "both streams in one": exec_("(echo o1; echo e1 >&2; echo o2; echo e2 >&2) 2>&1"),
    "both streams with a terminal": tty("echo o1; echo e1 >&2; echo o2; echo e2 >&2"),
    "much output": exec_("seq 1 1000000"),
    "much output with a terminal": tty("seq 1 200000"),
    "much on both streams": exec_("seq 1 200000; seq 1 200000 >&2"),
    "output without end of line": exec_("printf x; printf y >&2"),
    "nothing": exec_("true"),
    "8 MiB of nothing": exec_("head -c 8388608 /dev/zero"),
    "a program that never reads or writes": exec_("sleep 0.2"),
    "writes to a closed pipe": exec_("(sleep 0.2; echo late; echo $? >&2) | true; echo ${PIPESTATUS[@]}"),
    "head closes early": exec_("seq 1 1000000 | head -1; echo ${PIPESTATUS[0]}"),
    "the client's output closed early": exec_("yes", around='"$@" | head -1; exit ${PIPESTATUS[0]}'),
    "the client's output closed early, by pipefail": exec_("seq 1 10000000; echo $? >&2", around='set -o pipefail; "$@" | head -c 3'),
    # jobs
    "a job that keeps the output open": exec_("cat ~/fifo & echo started", held=True),
    "a job that keeps stderr open": exec_("cat ~/fifo >/dev/null & echo started", held=True),
    "a job with its own output": exec_("cat ~/fifo </dev/null >/dev/null 2>&1 & echo $! >~/job; echo started", held=True, jobs=True),
    "nohup": exec_("nohup cat ~/fifo >/dev/null 2>&1 & echo $! >~/job; echo started", held=True, jobs=True),
    "what nohup says": exec_("nohup echo hello"),
    "what nohup says with a terminal": tty("cd /tmp; nohup echo hello; rm -f nohup.out"),
    "setsid": exec_("setsid cat ~/fifo >/dev/null 2>&1 & echo $! >~/job; echo started", held=True, jobs=True),
    "setsid that keeps the output open": exec_("setsid cat ~/fifo & echo started", held=True),
    "a job with a terminal": tty("cat ~/fifo & echo $! >~/job; echo started", held=True, jobs=True),
    "a job that ignores HUP with a terminal": tty("(trap '' HUP; exec cat ~/fifo >/dev/null 2>&1 </dev/null) & " + RUNS, held=True, jobs=True),
    "a job that ignores HUP and keeps the terminal": tty("(trap '' HUP; exec cat ~/fifo) & " + RUNS, held=True, jobs=True),
    "nohup with a terminal": tty("nohup cat ~/fifo >/dev/null 2>&1 & " + RUNS, held=True, jobs=True),
    "setsid with a terminal": tty("setsid cat ~/fifo >/dev/null 2>&1 </dev/null & " + RUNS, held=True, jobs=True),
    "setsid that keeps the terminal": tty("setsid cat ~/fifo & " + RUNS, held=True, jobs=True),
    "a daemon, forked twice": exec_("(setsid cat ~/fifo >/dev/null 2>&1 </dev/null & " + RUNS + ")", held=True, jobs=True),
    "a job of a shell on stdin": shell("cat ~/fifo >/dev/null 2>&1 &\necho $! >~/job\necho started\n", held=True, jobs=True),
    "a job in a pipeline": exec_("(cat ~/fifo; echo late) & echo started; exit 3", held=True),
    "a coprocess": exec_("coproc cat; echo hello >&${COPROC[1]}; read x <&${COPROC[0]}; echo $x"),
    "wait for jobs": exec_("(sleep 0.1; exit 3) & wait $!; echo $?"),
    # terminals
    "stty -a": tty("stty -a"),
    "size": tty("stty size; tput cols; tput lines; echo $COLUMNS $LINES", rows=50, cols=132),
    "a tiny terminal": tty("stty size", rows=1, cols=1),
    "TERM": tty("echo $TERM; tput colors; tput bold | od -c", env={"TERM": "vt100"}),
    "TERM that nobody knows": tty("echo $TERM; tput colors; echo $?", env={"TERM": "no-such-terminal"}),
    "dumb terminal": tty("echo $TERM; tput cup 1 1; echo $?", env={"TERM": "dumb"}),
    "no terminal has no TERM": exec_("echo [$TERM]; tput colors; echo $?"),
    "changed modes": tty("stty -echo -icanon min 1; stty -a; stty sane; stty -a"),
    "modes of the client's terminal": tty("stty -a", around="stty erase ^H intr ^X -ixon iutf8; exec \"$@\""),
    "a program that closes its terminal and runs on": tty("exec <&- >&- 2>&-; sleep 0.3; exit 7"),
    "programs that close their terminal before they exit": tty("for i in $(seq 50); do sh -c 'echo $0; rm -f /tmp/no-such-file' $i; done; exec rm -f /tmp/no-such-file"),
    "a password prompt": tty("read -s -p 'Password: ' x; echo; echo got $x", typed=[("Password: ", "secret\r")]),
    "bash -i without a terminal": exec_("bash -ic 'echo $-' 2>&1", numbers=True),
    "script": tty("script -qec 'tty | sed s/[0-9]*$//; stty size' /dev/null"),
    "-t without a local terminal": exec_("tty", arguments=("-t",)),
    "interactive: exit 3": typed((PROMPT, "exit 3\r")),
    "interactive: the end of input": typed((PROMPT, "\x04")),
    "interactive: the greeting": typed((PROMPT, "exit\r"), greeted=True),
    # Without NOFLSH the kernel empties the terminal's queues after it has sent the signal (n_tty.c, isig), and with them, now and then, the prompt.
    "interactive: Ctrl-C at the prompt": typed((PROMPT, "stty noflsh\r"), (PROMPT, "abc"), ("abc", AtRest("\x03")), (PROMPT, "echo $?\r"), (PROMPT, "exit 0\r")),
    "interactive: Ctrl-C in a program": typed((PROMPT, "stty noflsh\r"), (PROMPT, CAT), (READY, "\x03"), (PROMPT, "echo $?\r"), (PROMPT, "exit 0\r")),
    "interactive: Ctrl-Z, jobs, fg": typed((PROMPT, "stty noflsh\r"), (PROMPT, CAT), (READY, "\x1a"), (PROMPT, "jobs\r"), (PROMPT, "fg\r"), ("exec cat'\r\n", "x\r"), ("x\r\nx\r\n", "\x04"),
                                           (PROMPT, "exit\r")),
    "interactive: Ctrl-\\": typed((PROMPT, "stty noflsh; ulimit -c 0\r"), (PROMPT, CAT), (READY, "\x1c"), (PROMPT, "echo $?\r"), (PROMPT, "exit\r")),
    "interactive: Ctrl-S and Ctrl-Q": typed((PROMPT, CAT), (READY, "\x13a\r\x11b\r"), ("a\r\n.*b\r\n.*b\r\n", "\x04"), (PROMPT, "exit\r")),
    "interactive: end of input for a program": typed((PROMPT, CAT), (READY, "x\r"), ("x\r\nx\r\n", "\x04"), (PROMPT, "exit\r")),
    "interactive: a stopped job at the end": typed((PROMPT, "stty noflsh\r"), (PROMPT, CAT), (READY, "\x1a"), (PROMPT, "exit\r"), (PROMPT, "exit\r")),
    # the command line
    "as an argument after --": exec_("echo -n -e x", arguments=("-q",)),
    "a command that begins with a dash": exec_("-x; echo $?"),
    "quoting": exec_("""printf '%s|' "a b" 'c  d' \\$HOME "e\\"f" g\\ h * ; echo"""),
    "several lines": exec_("echo one\necho two\n\n\nexit 5"),
    "a comment": exec_("# nothing\n"),
    "blanks alone": exec_("   "),
    "no command line at all": Case("", way="exec", stdin=b"echo from-stdin; exit 4\n"),
    "bytes that are no UTF-8": exec_("printf '\udcff\udcfe\udc80' | od -An -tx1"),
    "control characters": exec_("printf '%s' '\x01\x02\t\x1b[0m\x7f' | od -c"),
    "a command line of 100 KB": exec_(": " + "x" * 100_000 + "; echo done"),
    "a command line of 120 KB in many words": exec_("set -- " + "word " * 24_000 + "; echo $#"),
    "globs, tilde, braces": exec_("echo ~ {a,b}{1,2} /etc/pass[w]d"),
    "arithmetic and substitution": exec_("echo $((6 * 7)) $(echo sub) `echo back`"),
    "pipes, && and ||": exec_("false || echo or && echo and | cat; ! true; echo $?"),
    "a subsystem that is not there": exec_("no-such-subsystem", arguments=("-s",)),
    "sftp that hears nothing": exec_("sftp", arguments=("-s",)),
    "tools that look at the connection": exec_('echo $SSH_CLIENT; echo $SSH_CONNECTION; echo [$SSH_TTY] [$SSH_ORIGINAL_COMMAND] [$SSH_AUTH_SOCK] [$DISPLAY]'),
}


@dataclass
class Seen:
    out: str = ""
    err: str = ""
    status: object = None
    waits: bool | None = None    # for a job that is held
    job: str | None = None

    def differences(self, other: Seen) -> list[str]:
        return [f"{name}: {shorten(a)} | {shorten(b)}" for name in vars(self) if (a := getattr(self, name)) != (b := getattr(other, name))]


def shorten(value) -> str:
    text = repr(value)
    return text if len(text) < 1500 else f"{text[:700]} … {text[-700:]} ({len(text)})"


class Side:
    """One of the two servers, as one who uses OpenSSH's client sees it."""

    def __init__(self, name, stack, port, command, home):
        self.name, self.stack, self.port, self.command, self.home = name, stack, port, command, home

    def normal(self, data: bytes, case: Case) -> str:
        """What must differ between two connections is made equal."""
        text = data.decode(errors="backslashreplace")
        if len(text) > 100_000:
            return text
        text = re.sub(rf"\b{self.port}\b", "SERVER-PORT", text)
        text = re.sub(r"(127\.\d+\.\d+\.\d+) \d{4,5} ", r"\1 CLIENT-PORT ", text)
        for address in (self.stack.alice, self.stack.plain_alice):
            text = text.replace(address, "CLIENT")
        text = re.sub(r"pts/\d+", "pts/N", text)
        text = re.sub(r"Last login: .* from", "Last login: DATE from", text)
        if ("every", "env:MAIL") in listed():
            text = re.sub(r"(?m)^MAIL(=.*)?\r?\n", "", text)
        if ("every", "env:POSTERN_USER") in listed():
            text = re.sub(r"(?m)^POSTERN_(USER|NODE|TAGS|CONNECTION_ID)(=.*)?\r?\n", "", text)
        if case.typed and not case.greeted:
            text = re.sub(r"\A.*?(?=\x1b\[\?2004h)", "", text, flags=re.S)
        if case.numbers:
            seen: dict[str, str] = {}
            text = re.sub(r"\b\d{3,}\b", lambda m: seen.setdefault(m[0], f"N{len(seen)}"), text)
            text = re.sub(r"(?m)^ +| +(?= )", "", text)  # columns are as wide as the numbers were
        return text

    def run(self, case: Case) -> Seen:
        fifo, job = self.home / "fifo", self.home / "job"
        for path in (fifo, job):
            path.unlink(missing_ok=True)
        os.mkfifo(fifo)
        os.chmod(fifo, 0o666)
        env = self.stack.client_env({"TERM": "xterm-256color", **case.env})
        options = [*case.options, *(f"SendEnv={name}" for name in case.env if name != "TERM"), "LogLevel=INFO"]
        line = self.command(case.command, tty={"tty": True, "typed": None, "shell": False, "exec": None}[case.way], options=options)
        line[1:1] = case.arguments
        # Nothing of the client's may depend on whether we are on a terminal.
        line = ["bash", "-c", case.around, "bash", *(word.encode(errors="surrogateescape") for word in line)]
        seen = Seen()
        try:
            if case.way in ("tty", "typed"):
                with Terminal(line, rows=case.rows, cols=case.cols, env=env) as t:
                    for pattern, text in case.typed:
                        t.read_until(pattern)
                        if isinstance(text, AtRest):
                            wait_until(self.shell_waits_for_a_key, "a shell that waits for a key")
                        t.send(text)
                    if case.held:
                        seen.waits = not self.ends(lambda: t.pump() or t.eof, lambda: t.eof)
                        self.after(case, seen, fifo, job)
                    seen.status = t.wait()
                    seen.out = self.normal(t.screen, case)
            else:
                process = subprocess.Popen(line, stdin=subprocess.PIPE if case.stdin is not None else subprocess.DEVNULL, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, env=env)
                self.stack.clients.append(process)
                if case.held:
                    if case.stdin is not None:
                        process.stdin.write(case.stdin)
                        process.stdin.close()
                        process.stdin = None
                    seen.waits = not self.ends(lambda: None, lambda: process.poll() is not None)
                    self.after(case, seen, fifo, job)
                    out, err = process.communicate(timeout=20 * SLACK)
                else:
                    out, err = process.communicate(case.stdin, timeout=30 * SLACK)
                seen.status, seen.out, seen.err = process.returncode, self.normal(out, case), self.normal(err, case)
        finally:
            self.release(fifo)
            for path in (fifo, job):
                path.unlink(missing_ok=True)
        return seen

    def shell_waits_for_a_key(self) -> bool:
        """Of the user's bashes the one in the foreground of a terminal: jobs of other cases may be left."""
        owner = self.home.stat().st_uid
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                name, _, rest = (process / "stat").read_text().partition("(")[2].rpartition(") ")
                _, _, group, _, terminal, foreground = rest.split()[:6]
                if process.stat().st_uid == owner and name == "bash" and terminal != "0" and group == foreground:
                    if (process / "syscall").read_text().split()[0] in WAITS_FOR_A_KEY[platform.machine()]:
                        return True
        return False

    @staticmethod
    def ends(step, over) -> bool:
        """Whether it ends by itself. Who waits for the job waits for ever: a second and a half tell."""
        deadline = time.monotonic() + 1.5 * SLACK
        while not over() and time.monotonic() < deadline:
            step()
            time.sleep(0.01)
        return over()

    def after(self, case: Case, seen: Seen, fifo, job) -> None:
        if case.jobs:
            pid = int(wait_until(lambda: job.exists() and job.read_text().strip(), "the job's number"))

            def gone():
                with contextlib.suppress(OSError):
                    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z"
                return True
            seen.job = "ends" if self.ends(lambda: None, gone) else "lives on"
        self.release(fifo)

    @staticmethod
    def release(fifo) -> None:
        with contextlib.suppress(OSError):  # ENXIO: nobody reads
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture(scope="module")
def sides(accounts):
    stack = new_stack(accounts).start()
    sshd = Sshd(stack, stack.dir / "sshd")
    home = pathlib.Path(pwd.getpwnam(stack.user).pw_dir)
    (home / ".bashrc").write_text("READ_BASHRC=yes\n")
    (home / ".profile").write_text("READ_PROFILE=yes\n")
    sides = [Side("OpenSSH", stack, sshd.port, lambda c, **kw: sshd.command(c, bind=stack.plain_alice, **kw), home),
             Side("Postern", stack, stack.port, lambda c, **kw: stack.ssh_command(c, bind=stack.plain_alice, **kw), home),
             Side("Postern, recorded", stack, stack.port, lambda c, **kw: stack.ssh_command(c, bind=stack.alice, **kw), home)]
    # A first login of each, so that each has a last one to tell of.
    for side in sides:
        side.run(CASES["interactive: the greeting"])
    yield stack, sshd, sides
    for name in (".bashrc", ".profile"):
        (home / name).unlink()
    sshd.stop()
    stack.stop()


@pytest.mark.parametrize("name", CASES)
def test_a_command_does_what_it_does_under_sshd(sides, name):
    _, _, (theirs, ours, recorded) = sides
    case, known = CASES[name], listed()
    expected = theirs.run(case)
    found = {"commands": expected.differences(ours.run(case)), "commands, recorded": expected.differences(recorded.run(case))}
    surprises = {way: d for way, d in found.items() if d and (way, name) not in known and ("commands", name) not in known}
    assert not surprises, f"not in docs/DIFFERENCES.md (OpenSSH | Postern):\n" + "\n".join(f"{way}: {x}" for way, d in surprises.items() for x in d)
    stale = [way for way, d in found.items() if not d and (way, name) in known]
    assert not stale, f"docs/DIFFERENCES.md lists what does not differ: {stale}"


def test_every_row_of_the_page_about_commands_is_a_command_of_this_test():
    assert not {what for way, what in listed() if way.startswith("commands")} - set(CASES)


SIGNALS = ["HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM", "XCPU", "SYS", "RTMIN"]


async def ask(connect, command):
    async with connect() as conn:
        return await conn.run(command)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("core", ["0", "unlimited"])
def test_a_signal_that_ended_a_program_is_told_of_as_sshd_does(sides, name, core):
    """Name, core flag, message and language tag as they stand in the packet, which OpenSSH's client does not show."""
    import asyncssh
    stack, sshd, (ours, *_) = sides
    common = dict(local_addr=(stack.plain_alice, 0), username=stack.user, known_hosts=None, config=None, agent_path=None)
    answers = []
    for port, keys in ((sshd.port, [str(sshd.work / "key")]), (stack.port, None)):
        r = asyncio.run(ask(lambda: asyncssh.connect(stack.server, port, client_keys=keys, **common), f"cd ~; ulimit -c {core}; kill -{name} $$; echo survived"))
        answers.append((r.exit_status, r.exit_signal, r.stdout, r.stderr))
    for file in ours.home.glob("core*"):
        file.unlink()
    assert answers[0] == answers[1]
