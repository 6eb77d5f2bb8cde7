// x/crypto/ssh and pkg/sftp behind the interface of ../lib/common.py.
package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sort"
	"sync"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

type request struct {
	Host, Bind, User, Auth, Password, Key, Do string
	Port                                      int
	Command                                   *string
	Env                                       map[string]string
	Pty                                       *struct {
		Term       string
		Cols, Rows int
		Verase     *uint32
	}
	Rekey         uint64
	Steps         [][]any
	Stdin, Stdout string
	Agent         string
	Target        []any
	PortFile      string `json:"port_file"`
	Count         int
}

type answer struct {
	Out     []byte  `json:"out"` // encoding/json writes base64
	Err     []byte  `json:"err"`
	Status  *int    `json:"status"`
	Signal  *string `json:"signal"`
	Rekeys  int     `json:"rekeys"`
	Results []any   `json:"results"`
	Error   string  `json:"error,omitempty"`
}

// output collects what comes and wakes whoever expects something.
type output struct {
	mutex sync.Mutex
	more  *sync.Cond
	data  bytes.Buffer
	file  *os.File
	ended bool
}

func (o *output) Write(p []byte) (int, error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	if o.file != nil {
		return o.file.Write(p)
	}
	o.data.Write(p)
	o.more.Broadcast()
	return len(p), nil
}

func (o *output) end() {
	o.mutex.Lock()
	o.ended = true
	o.more.Broadcast()
	o.mutex.Unlock()
}

func (o *output) expect(text string, from int) (int, error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	for {
		if at := bytes.Index(o.data.Bytes()[from:], []byte(text)); at >= 0 {
			return from + at + len(text), nil
		}
		if o.ended {
			return 0, fmt.Errorf("ended before %q: %q", text, o.data.Bytes())
		}
		o.more.Wait()
	}
}

func run(client *ssh.Client, r request, a *answer) error {
	session, err := client.NewSession()
	if err != nil {
		return err
	}
	for name, value := range r.Env {
		if err := session.Setenv(name, value); err != nil {
			return fmt.Errorf("env: %w", err)
		}
	}
	if r.Pty != nil {
		modes := ssh.TerminalModes{}
		if r.Pty.Verase != nil {
			modes[ssh.VERASE] = *r.Pty.Verase
		}
		if err := session.RequestPty(r.Pty.Term, r.Pty.Rows, r.Pty.Cols, modes); err != nil {
			return fmt.Errorf("pty: %w", err)
		}
	}
	if r.Agent != "" {
		if err := agent.ForwardToRemote(client, r.Agent); err != nil {
			return err
		}
		if err := agent.RequestAgentForwarding(session); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
	}
	out := &output{}
	out.more = sync.NewCond(&out.mutex)
	if r.Stdout != "" {
		if out.file, err = os.Create(r.Stdout); err != nil {
			return err
		}
		defer out.file.Close()
	}
	var stderr bytes.Buffer
	session.Stdout, session.Stderr = out, &stderr
	stdin, err := session.StdinPipe()
	if err != nil {
		return err
	}
	if r.Command == nil {
		err = session.Shell()
	} else {
		err = session.Start(*r.Command)
	}
	if err != nil {
		return err
	}
	finished := make(chan error, 1)
	go func() {
		e := session.Wait()
		out.end()
		finished <- e
	}()
	seen, ended := 0, false
	for _, step := range r.Steps {
		switch step[0] {
		case "expect":
			if seen, err = out.expect(step[1].(string), seen); err != nil {
				return err
			}
		case "send":
			if _, err = io.WriteString(stdin, step[1].(string)); err != nil {
				return err
			}
		case "resize":
			if err = session.WindowChange(int(step[2].(float64)), int(step[1].(float64))); err != nil {
				return err
			}
		case "signal":
			if err = session.Signal(ssh.Signal(step[1].(string))); err != nil {
				return err
			}
		case "eof":
			stdin.Close()
			ended = true
		}
	}
	if r.Stdin != "" {
		file, err := os.Open(r.Stdin)
		if err != nil {
			return err
		}
		if _, err = io.Copy(stdin, file); err != nil {
			return err
		}
	}
	if !ended && r.Pty == nil {
		stdin.Close()
	}
	err = <-finished
	status := 0
	var exit *ssh.ExitError
	switch {
	case err == nil:
		a.Status = &status
	case errors.As(err, &exit):
		if name := exit.Signal(); name != "" {
			a.Signal = &name
		} else {
			status = exit.ExitStatus()
			a.Status = &status
		}
	default:
		return err
	}
	a.Out, a.Err = out.data.Bytes(), stderr.Bytes()
	return nil
}

func transfer(from io.Reader, fromErr error, to io.WriteCloser, toErr error) error {
	if fromErr != nil || toErr != nil {
		return errors.Join(fromErr, toErr)
	}
	_, err := io.Copy(to, from)
	return errors.Join(err, to.Close())
}

func doSftp(client *ssh.Client, r request, a *answer) error {
	s, err := sftp.NewClient(client)
	if err != nil {
		return err
	}
	for _, step := range r.Steps {
		arg := func(i int) string { return step[i].(string) }
		switch step[0] {
		case "put":
			from, e1 := os.Open(arg(1))
			to, e2 := s.Create(arg(2))
			err = transfer(from, e1, to, e2)
		case "get":
			from, e1 := s.Open(arg(1))
			to, e2 := os.Create(arg(2))
			err = transfer(from, e1, to, e2)
		case "symlink":
			err = s.Symlink(arg(1), arg(2))
		case "readlink":
			var target string
			target, err = s.ReadLink(arg(1))
			a.Results = append(a.Results, target)
		case "ls":
			var files []os.FileInfo
			files, err = s.ReadDir(arg(1))
			names := []string{}
			for _, f := range files {
				names = append(names, f.Name())
			}
			sort.Strings(names)
			a.Results = append(a.Results, names)
		}
		if err != nil {
			return fmt.Errorf("%v: %w", step, err)
		}
	}
	return s.Close()
}

func channels(client *ssh.Client, r request, a *answer) error {
	type one struct {
		session *ssh.Session
		stdin   io.Writer
		out     *bytes.Buffer
	}
	var open []one
	for i := 0; i < r.Count; i++ {
		session, err := client.NewSession()
		if err != nil {
			return err
		}
		o := one{session: session, out: &bytes.Buffer{}}
		session.Stdout = o.out
		o.stdin, _ = session.StdinPipe()
		if err := session.Start(*r.Command); err != nil {
			return err
		}
		open = append(open, o)
	}
	for i, o := range open {
		fmt.Fprintf(o.stdin, "line %d\n", i)
	}
	for _, o := range open {
		if err := o.session.Wait(); err != nil {
			return err
		}
		a.Results = append(a.Results, o.out.String())
	}
	return nil
}

// whole reads all that a mirror says or hears (../lib/common.py, Mirror).
func whole(from io.Reader) ([]byte, error) {
	head := make([]byte, 8)
	if _, err := io.ReadFull(from, head); err != nil {
		return nil, err
	}
	got := make([]byte, 8+binary.BigEndian.Uint64(head))
	copy(got, head)
	_, err := io.ReadFull(from, got[8:])
	return got, err
}

func localForward(client *ssh.Client, r request, a *answer) error {
	data, err := os.ReadFile(r.Stdin)
	if err != nil {
		return err
	}
	question := append(binary.BigEndian.AppendUint64(nil, uint64(len(data))), data...)
	finished := make(chan error, r.Count)
	for i := 0; i < r.Count; i++ {
		conn, err := client.Dial("tcp", fmt.Sprintf("%v:%v", r.Target[0], r.Target[1]))
		if err != nil {
			return err
		}
		go func(i int) {
			_, err := conn.Write(question)
			var got []byte
			if err == nil {
				got, err = whole(conn)
			}
			conn.Close()
			if err == nil {
				err = os.WriteFile(fmt.Sprintf("%s.%d", r.Stdout, i), got[8:], 0o600)
			}
			finished <- err
		}(i)
	}
	for i := 0; i < r.Count; i++ {
		err = errors.Join(err, <-finished)
	}
	return err
}

func remoteForward(client *ssh.Client, r request, a *answer) error {
	listener, err := client.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	port := listener.Addr().(*net.TCPAddr).Port
	if err := os.WriteFile(r.PortFile+".new", []byte(fmt.Sprint(port)), 0o600); err != nil {
		return err
	}
	if err := os.Rename(r.PortFile+".new", r.PortFile); err != nil {
		return err
	}
	for i := 0; i < r.Count; i++ {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		got, err := whole(conn)
		if err == nil {
			_, err = conn.Write(got)
		}
		if err != nil {
			return err
		}
		io.Copy(io.Discard, conn) // the other end has it all when it closes
		conn.Close()
	}
	return listener.Close()
}

func talk(r request, a *answer) error {
	config := &ssh.ClientConfig{User: r.User}
	config.RekeyThreshold = r.Rekey
	a.Rekeys = -1
	var mutex sync.Mutex
	// Called at each key exchange.
	config.HostKeyCallback = func(string, net.Addr, ssh.PublicKey) error {
		mutex.Lock()
		a.Rekeys++
		mutex.Unlock()
		return nil
	}
	switch r.Auth { // it always tries none first
	case "password":
		config.Auth = []ssh.AuthMethod{ssh.Password(r.Password)}
	case "key":
		text, err := os.ReadFile(r.Key)
		if err != nil {
			return err
		}
		key, err := ssh.ParsePrivateKey(text)
		if err != nil {
			return err
		}
		config.Auth = []ssh.AuthMethod{ssh.PublicKeys(key)}
	}
	local, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(r.Bind, "0"))
	if err != nil {
		return err
	}
	address := net.JoinHostPort(r.Host, fmt.Sprint(r.Port))
	tcp, err := (&net.Dialer{LocalAddr: local}).Dial("tcp", address)
	if err != nil {
		return err
	}
	conn, chans, requests, err := ssh.NewClientConn(tcp, address, config)
	if err != nil {
		return err
	}
	client := ssh.NewClient(conn, chans, requests)
	defer client.Close()
	return map[string]func(*ssh.Client, request, *answer) error{"run": run, "sftp": doSftp, "channels": channels,
		"local": localForward, "remote": remoteForward}[r.Do](client, r, a)
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == "many" {
		if err := holdMany(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var r request
	var a answer
	err := json.Unmarshal([]byte(os.Args[1]), &r)
	if err == nil {
		err = talk(r, &a)
	}
	if err != nil {
		a.Error = err.Error()
	}
	json.NewEncoder(os.Stdout).Encode(a)
}
