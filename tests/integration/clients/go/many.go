// Many live connections in one process, and when each of them ended: for bench/revocation.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

type group struct {
	Bind, Kind string // "session": a program on a pty; "none": like ssh -N; "forward": a forwarded connection that is open
	Count      int
}

type many struct {
	Host, User string
	Port       int
	Target     string // of the forwards, host:port
	Groups     []group
}

// ended is what became of a connection, in nanoseconds since 1970; 0: it lives.
type ended struct {
	Group    int   `json:"group"`
	LastByte int64 `json:"last_byte"`
	Closed   int64 `json:"closed"`
}

// timed notes when bytes came last and when the connection was over.
type timed struct {
	net.Conn
	mutex sync.Mutex
	told  ended
}

func (t *timed) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	now := time.Now().UnixNano()
	t.mutex.Lock()
	if n > 0 {
		t.told.LastByte = now
	}
	t.mutex.Unlock()
	return n, err
}

// over notes that the connection has ended; x/crypto/ssh does not read to the end of the TCP connection after a disconnect message.
func (t *timed) over() {
	t.mutex.Lock()
	t.told.Closed = time.Now().UnixNano()
	t.mutex.Unlock()
}

func hold(m many, number int, g group) (*timed, error) {
	local, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(g.Bind, "0"))
	if err != nil {
		return nil, err
	}
	address := net.JoinHostPort(m.Host, fmt.Sprint(m.Port))
	tcp, err := (&net.Dialer{LocalAddr: local}).Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	t := &timed{Conn: tcp, told: ended{Group: number}}
	conn, chans, requests, err := ssh.NewClientConn(t, address, &ssh.ClientConfig{User: m.User, HostKeyCallback: ssh.InsecureIgnoreHostKey()})
	if err != nil {
		return nil, err
	}
	client := ssh.NewClient(conn, chans, requests)
	go func() {
		client.Wait()
		t.over()
	}()
	switch g.Kind {
	case "session":
		session, err := client.NewSession()
		if err != nil {
			return nil, err
		}
		out, err := session.StdoutPipe()
		if err != nil {
			return nil, err
		}
		if err = session.RequestPty("xterm", 24, 80, ssh.TerminalModes{}); err != nil {
			return nil, err
		}
		if err = session.Start("echo here; exec sleep 100000"); err != nil {
			return nil, err
		}
		if _, err = bufio.NewReader(out).ReadString('\n'); err != nil {
			return nil, err
		}
		go io.Copy(io.Discard, out)
	case "forward":
		forwarded, err := client.Dial("tcp", m.Target)
		if err != nil {
			return nil, err
		}
		if _, err = io.ReadFull(forwarded, make([]byte, 1)); err != nil {
			return nil, err
		}
		go io.Copy(io.Discard, forwarded)
	}
	return t, nil
}

// holdMany reads what to hold from argument, says {"ready":N}, and answers each line of its input with what has ended so far.
func holdMany(argument string) error {
	var m many
	if err := json.Unmarshal([]byte(argument), &m); err != nil {
		return err
	}
	var mutex sync.Mutex
	var held []*timed
	var failed error
	var wait sync.WaitGroup
	turns := make(chan struct{}, 16)
	for number, g := range m.Groups {
		for i := 0; i < g.Count; i++ {
			wait.Add(1)
			turns <- struct{}{}
			go func() {
				defer wait.Done()
				t, err := hold(m, number, g)
				<-turns
				mutex.Lock()
				defer mutex.Unlock()
				if err != nil {
					failed = err
				} else {
					held = append(held, t)
				}
			}()
		}
	}
	wait.Wait()
	if failed != nil {
		return failed
	}
	out := json.NewEncoder(os.Stdout)
	out.Encode(map[string]int{"ready": len(held)})
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		told := []ended{}
		for _, t := range held {
			t.mutex.Lock()
			told = append(told, t.told)
			t.mutex.Unlock()
		}
		out.Encode(told)
	}
	return nil
}
