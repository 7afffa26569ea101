import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { runTool } from '../../src/lib/process.js';
import { unpackDebian } from './debian-package.js';
import { startNamespace } from './namespace.js';
import { freePort, greetsWith } from './port.js';
import { READY_TIMEOUT_MS } from './server.js';

const TOOL_TIMEOUT_MS = 60_000;
/** The server, the client, and the library that nothing else brings along. */
const PACKAGES = ['nbd-server', 'nbd-client', 'libnl-genl-3-200', 'libnl-3-200'];

export interface DebianNbdServer extends AsyncDisposable {
  readonly uri: (name: string) => string;
}

/**
 * Debian's nbd-server on a port of loopback, with the export files of `exportsDirectory`.
 */
export async function startDebianNbdServer(options: {
  directory: string;
  exportsDirectory: string;
}): Promise<DebianNbdServer> {
  const unpacked = await unpackDebian('nbd-server', PACKAGES);
  const configFile = path.join(options.directory, 'nbd-server.conf');
  const port = await freePort();
  await writeFile(
    configFile,
    [
      '[generic]',
      'allowlist = true',
      `includedir = ${options.exportsDirectory}`,
      'listenaddr = 127.0.0.1',
      `port = ${port}`,
      '',
    ].join('\n'),
  );
  await using undo = new CleanupStack();
  // It goes into the background, and forks for each client: with the namespace all of it ends. Its pid
  // file lies in /run.
  const namespace = undo.use(await startNamespace([{ tmpfs: '/run' }]));
  const args = namespace.entering(path.join(unpacked, 'bin/nbd-server'), ['-C', configFile]);
  await runTool('nsenter', args, { timeoutMs: TOOL_TIMEOUT_MS });
  await pollUntil(async () => ((await greetsWith(port, 'NBDMAGIC')) ? true : undefined), {
    timeoutMs: READY_TIMEOUT_MS,
    what: 'nbd-server becoming ready',
  });
  const steps = undo.move();
  return {
    uri: (name) => `nbd://127.0.0.1:${port}/${name}`,
    [Symbol.asyncDispose]: () => steps.run(),
  };
}

/** The names that `nbd-client -l` lists of a server on a port of loopback. */
export async function listWithNbdClient(port: number): Promise<string[]> {
  const unpacked = await unpackDebian('nbd-server', PACKAGES);
  const libraries = [
    path.join(unpacked, 'usr/lib/x86_64-linux-gnu'),
    path.join(unpacked, 'lib/x86_64-linux-gnu'),
  ];
  const { stdout } = await runTool(
    'env',
    [
      `LD_LIBRARY_PATH=${libraries.join(':')}`,
      path.join(unpacked, 'sbin/nbd-client'),
      ...['-l', '127.0.0.1', String(port)],
    ],
    { timeoutMs: TOOL_TIMEOUT_MS },
  );
  const lines = stdout.split('\n').filter((line) => line !== '' && !line.startsWith('Negotiation'));
  return lines.map((line) => line.replace(/:.*$/, ''));
}
