import { mkdir, readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { runTool, startServer } from '../../src/lib/process.js';
import { unpackDebian } from './debian-package.js';
import type { LabDirectory } from './directory.js';
import { startNamespace, type LabNamespace } from './namespace.js';
import { freePort, greetsWith } from './port.js';
import { READY_TIMEOUT_MS } from './server.js';

const TOOL_TIMEOUT_MS = 60_000;
/** The server, and the one library of it that nothing else brings along. */
const PACKAGES = ['openssh-server', 'libwrap0'];

export interface LabSshd extends AsyncDisposable {
  readonly port: number;
  /** Lets in as root. */
  readonly keyFile: string;
  /** Names this server; `foreignHostsFile` names another one under its address. */
  readonly knownHostsFile: string;
  readonly foreignHostsFile: string;
  /** Ends every session, and refuses new ones. */
  kill(): Promise<void>;
  /** After `kill()`: the same server again. */
  restart(): Promise<void>;
}

/**
 * A private sshd on 127.0.0.1 with keys of its own, in `<lab>/ssh`. Sessions run as root on this machine's files,
 * with a /run of their own.
 */
export async function startSshd(lab: LabDirectory): Promise<LabSshd> {
  await using undo = new CleanupStack();
  const directory = lab.file('ssh');
  const file = (name: string): string => path.join(directory, name);
  undo.defer(() => rm(directory, { recursive: true, force: true }));
  const unpacked = await unpackDebian('openssh-server', PACKAGES);
  const port = await freePort();
  await mkdir(file('empty'), { recursive: true });
  for (const name of ['host', 'foreign', 'user']) {
    const args = ['-q', '-t', 'ed25519', '-N', '', '-C', name, '-f', file(name)];
    await runTool('ssh-keygen', args, { timeoutMs: TOOL_TIMEOUT_MS });
  }
  for (const name of ['host', 'foreign']) {
    const key = (await readFile(file(`${name}.pub`), 'utf8')).split(' ').slice(0, 2).join(' ');
    await writeFile(file(`${name}.known`), `[127.0.0.1]:${port} ${key}\n`);
  }
  await writeFile(
    file('passwd'),
    `${await readFile('/etc/passwd', 'utf8')}sshd:x:64057:65534::/run/sshd:/bin/false\n`,
  );
  await writeFile(
    file('sshd_config'),
    [
      `ListenAddress 127.0.0.1:${port}`,
      `HostKey ${file('host')}`,
      `AuthorizedKeysFile ${file('user.pub')}`,
      ...['PidFile none', 'UsePAM no', 'StrictModes no', 'PasswordAuthentication no', ''],
    ].join('\n'),
  );
  const start = (): Promise<LabNamespace> => runSshd({ directory, unpacked, port });
  let namespace = await start();
  undo.defer(() => namespace[Symbol.asyncDispose]());
  const steps = undo.move();
  return {
    port,
    keyFile: file('user'),
    knownHostsFile: file('host.known'),
    foreignHostsFile: file('foreign.known'),
    kill: async () => {
      await namespace[Symbol.asyncDispose]();
    },
    restart: async () => {
      namespace = await start();
    },
    [Symbol.asyncDispose]: () => steps.run(),
  };
}

/** It ends with the namespace, as its sessions do. */
async function runSshd(place: { directory: string; unpacked: string; port: number }): Promise<LabNamespace> {
  const { directory, unpacked, port } = place;
  const file = (name: string): string => path.join(directory, name);
  await using undo = new CleanupStack();
  const namespace = undo.use(
    await startNamespace([
      { tmpfs: '/run' },
      { bind: file('empty'), over: '/run/sshd' },
      { bind: file('passwd'), over: '/etc/passwd' },
    ]),
  );
  const libraries = path.join(unpacked, 'usr/lib/x86_64-linux-gnu');
  const program = [`LD_LIBRARY_PATH=${libraries}`, path.join(unpacked, 'usr/sbin/sshd')];
  const args = namespace.entering('env', [...program, '-D', '-e', '-f', file('sshd_config')]);
  await startServer('nsenter', args, {
    owner: 'lab',
    readyTimeoutMs: READY_TIMEOUT_MS,
    isReady: () => greetsWith(port, 'SSH-2'),
  });
  undo.release();
  return namespace;
}
