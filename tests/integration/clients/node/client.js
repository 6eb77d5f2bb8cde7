// ssh2 behind the interface of lib/common.py.
'use strict';
const fs = require('fs');
const { Client } = require('ssh2');
const request = JSON.parse(process.argv[2]);
const client = new Client();
let rekeys = -1, done = false;

function answer(value) {
  if (done) return;
  done = true;
  process.stdout.write(JSON.stringify({ rekeys, ...value }) + '\n', () => { client.end(); process.exit(0); });
}
const fail = (e) => answer({ error: `${e.level || e.name || ''}: ${e.message || e}` });
process.on('uncaughtException', fail);

function run() {
  const options = { env: request.env || {} };
  if (request.pty) options.pty = { term: request.pty.term, cols: request.pty.cols, rows: request.pty.rows, modes: 'verase' in request.pty ? { VERASE: request.pty.verase } : {} };
  const opened = (e, stream) => {
    if (e) return fail(e);
    // All handlers at once: ssh2 may emit data, exit and close of one segment in one tick.
    let out = Buffer.alloc(0), seen = 0, wake = null, closed = false;
    const err = [], file = request.stdout ? fs.openSync(request.stdout, 'w') : null;
    let status = null, signal = null, core = false;
    // ssh2 begins no key exchange by itself.
    let moved = 0;
    const count = (n) => {
      moved += n;
      if (request.rekey && moved >= request.rekey) { moved = 0; client._protocol.rekey(); }
    };
    stream.on('data', (d) => { count(d.length); if (file !== null) fs.writeSync(file, d); else out = Buffer.concat([out, d]); if (wake) wake(); });
    stream.stderr.on('data', (d) => err.push(d));
    stream.on('exit', (code, name, dumped) => { status = code; signal = name ? name.replace(/^SIG/, '') : null; core = !!dumped; });
    stream.on('close', () => {
      closed = true;
      if (wake) wake();
      if (!scripted) return;
      answer({ out: out.toString('base64'), err: Buffer.concat(err).toString('base64'), status, signal, core });
    });
    let scripted = false;
    (async () => {
      let ended = false;
      for (const [what, ...a] of request.steps || []) {
        if (what === 'expect') {
          let at;
          while ((at = out.indexOf(a[0], seen)) < 0) {
            if (closed) throw new Error(`ended before ${a[0]}: ${out.subarray(-500)}`);
            await new Promise((r) => { wake = r; });
          }
          seen = at + Buffer.byteLength(a[0]);
        } else if (what === 'send') stream.write(a[0]);
        else if (what === 'resize') stream.setWindow(a[1], a[0], 0, 0);
        else if (what === 'signal') stream.signal(a[0]);
        else if (what === 'rekey') client._protocol.rekey();
        else if (what === 'eof') { stream.end(); ended = true; }
      }
      scripted = true;
      if (request.stdin) {
        const source = fs.createReadStream(request.stdin);
        source.on('data', (d) => count(d.length));
        source.pipe(stream);
      }
      if (!request.stdin && !ended && !request.pty) stream.end();
      if (closed) stream.emit('close');
    })().catch(fail);
  };
  if (request.command === null) client.shell(options.pty || false, options, opened);
  else client.exec(request.command, options, opened);
}

function sftp() {
  client.sftp(async (e, s) => {
    if (e) return fail(e);
    const results = [];
    const call = (name, ...a) => new Promise((r, no) => s[name](...a, (e2, v) => (e2 ? no(new Error(`${name}: ${e2.message}`)) : r(v))));
    try {
      for (const [what, ...a] of request.steps) {
        if (what === 'put') await call('fastPut', ...a);
        else if (what === 'get') await call('fastGet', ...a);
        else if (what === 'symlink') await call('symlink', ...a);
        else if (what === 'readlink') results.push(await call('readlink', a[0]));
        else if (what === 'ls') results.push((await call('readdir', a[0])).map((x) => x.filename).filter((n) => n !== '.' && n !== '..').sort());
      }
      answer({ results });
    } catch (e2) { fail(e2); }
  });
}

function channels() {
  const open = [], results = [];
  let left = request.count;
  for (let i = 0; i < request.count; i++) {
    client.exec(request.command, (e, stream) => {
      if (e) return fail(e);
      results[i] = '';
      open.push([i, stream]);
      stream.on('data', (d) => { results[i] += d; });
      stream.on('close', () => { if (--left === 0) answer({ results }); });
      if (open.length === request.count) for (const [n, s] of open) s.write(`line ${n}\n`);
    });
  }
}

// Everything that a mirror says or hears (lib/common.py, Mirror) on one stream.
function whole(stream, heard) {
  let got = Buffer.alloc(0), done = false;
  stream.on('data', (d) => {
    got = Buffer.concat([got, d]);
    if (!done && got.length >= 8 && got.length >= 8 + Number(got.readBigUInt64BE(0))) { done = true; heard(got); }
  });
}

function local() {
  const data = fs.readFileSync(request.stdin), head = Buffer.alloc(8);
  head.writeBigUInt64BE(BigInt(data.length));
  let left = request.count;
  for (let i = 0; i < request.count; i++) {
    client.forwardOut('127.0.0.1', 0, request.target[0], request.target[1], (e, stream) => {
      if (e) return fail(e);
      whole(stream, (got) => {
        fs.writeFileSync(`${request.stdout}.${i}`, got.subarray(8));
        stream.end();
        if (--left === 0) answer({});
      });
      stream.write(Buffer.concat([head, data]));
    });
  }
}

function remote() {
  let left = request.count;
  client.on('tcp connection', (_details, accept) => {
    const stream = accept();
    whole(stream, (got) => stream.end(got));
    stream.on('close', () => { if (--left === 0) answer({}); });
  });
  client.forwardIn('127.0.0.1', 0, (e, port) => {
    if (e) return fail(e);
    fs.writeFileSync(request.port_file + '.new', String(port));
    fs.renameSync(request.port_file + '.new', request.port_file);
  });
}

function unix() {
  try {
    client.openssh_forwardOutStreamLocal(request.path, (e, stream) => (e ? fail(e) : stream.end(answer({}))));
  } catch (e) { fail(e); }
}

client.on('ready', () => ({ run, sftp, channels, local, remote, unix })[request.do]());
client.on('handshake', () => { rekeys++; });
client.on('error', fail);
client.on('close', () => fail(new Error('the connection was closed')));
const login = { host: request.host, port: request.port, localAddress: request.bind, username: request.user };
// ssh2 tries none first, unless it is told the methods.
if (request.auth === 'password') login.authHandler = [{ type: 'password', username: request.user, password: request.password }];
if (request.auth === 'key') login.authHandler = [{ type: 'publickey', username: request.user, key: fs.readFileSync(request.key) }];
if (request.agent) Object.assign(login, { agent: request.agent, agentForward: true });
client.connect(login);
