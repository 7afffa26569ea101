import { mkdtemp, rename, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import {
  exportUris,
  hostMonotonicMs,
  isExportDaemonAlive,
  readExportStatus,
  reloadExportDaemon,
  type ExportFileStatus,
  type ExportStatus,
} from '../../src/exports/index.js';
import { processStartTime } from '../../src/lib/process.js';
import { parseNbdUri } from '../../src/nbd/uri.js';

const FILE: ExportFileStatus = {
  file: 'a.conf',
  digest: 'd',
  name: 'a',
  state: 'served',
  listeners: ['unix', 'tcp'],
  sizeBytes: 512,
  format: 'raw',
  isReadOnly: true,
  description: null,
  materialize: null,
  error: null,
};

function listener(
  id: string,
  address: ExportStatus['listeners'][number]['address'],
  tls: 'none' | 'psk' = 'none',
) {
  return { id, address, tls, state: 'up' as const, pid: 1, restarts: 0, error: null };
}

async function status(): Promise<ExportStatus> {
  return {
    version: 1,
    pid: process.pid,
    processStartTime: (await processStartTime(process.pid))!,
    startedAt: '2026-11-21T12:00:00.000Z',
    exportsDirectory: '/etc/holdfast/exports.d',
    generation: 1,
    appliedAt: '2026-11-21T12:00:00.000Z',
    readAtMs: 1,
    listeners: [
      listener('unix', { kind: 'unix', path: '/run/a b/nbd.sock' }),
      listener('tcp', { kind: 'tcp', host: '::1', port: 10_809 }, 'psk'),
      listener('own:1', { kind: 'tcp', host: '127.0.0.1', port: 1 }, 'psk'),
    ],
    files: [FILE],
    events: [],
  };
}

describe('the status of the export daemon', () => {
  let directory: string;
  const file = () => path.join(directory, 'status.json');
  beforeEach(async () => {
    directory = await mkdtemp(path.join(os.tmpdir(), 'hf-status-'));
  });
  afterEach(() => rm(directory, { recursive: true }));

  test('is read as it was written; none is null, and another file is an error', async () => {
    expect(await readExportStatus(file())).toBeNull();
    await writeFile(file(), JSON.stringify(await status()));
    expect(await readExportStatus(file())).toEqual(await status());
    for (const text of ['', '{}', JSON.stringify({ ...(await status()), version: 2 })]) {
      await writeFile(file(), text);
      await expect(readExportStatus(file())).rejects.toMatchObject({
        code: 'EXPORT_DAEMON_UNAVAILABLE',
      });
    }
  });

  test('names URIs that can be used as they are', async () => {
    const uris = exportUris(await status(), FILE);
    expect(uris).toEqual(['nbd+unix:///a?socket=%2Frun%2Fa%20b%2Fnbd.sock', 'nbds://[::1]:10809/a']);
    expect(uris.map((uri) => parseNbdUri(uri).exportName)).toEqual(['a', 'a']);
    expect(exportUris(await status(), { ...FILE, name: null })).toEqual([]);
  });

  test('tells a daemon that lives from another process of its number', async () => {
    expect(await isExportDaemonAlive(await status())).toBe(true);
    expect(await isExportDaemonAlive({ ...(await status()), processStartTime: '1' })).toBe(false);
  });

  test.each([
    ['no pid file', null],
    ['a pid file that is cut off', ''],
    ['a pid file of another process', '1\n'],
    ['a pid file that names everybody', '-1\n'],
    ['a pid file with more in it', `${process.pid}\n1\n`],
  ])('with %s nothing is signalled', async (_what, text) => {
    await writeFile(file(), JSON.stringify(await status()));
    const pidFile = path.join(directory, 'pid');
    if (text !== null) await writeFile(pidFile, text);
    await expect(
      reloadExportDaemon({ pidFile, statusFile: file() }, { timeoutMs: 100 }),
    ).rejects.toMatchObject({
      code: 'EXPORT_DAEMON_UNAVAILABLE',
    });
  });

  test('a daemon is signalled, and its answer must be of a reading that began afterwards', async () => {
    const place = { pidFile: path.join(directory, 'pid'), statusFile: file() };
    await writeFile(place.pidFile, `${process.pid}\n`);
    await writeFile(file(), JSON.stringify({ ...(await status()), readAtMs: hostMonotonicMs() }));
    let signals = 0;
    const onSignal = () => (signals += 1);
    process.on('SIGHUP', onSignal);
    try {
      await expect(reloadExportDaemon(place, { timeoutMs: 200 })).rejects.toMatchObject({
        code: 'EXPORT_DAEMON_UNAVAILABLE',
        details: { pid: process.pid },
      });
      const answer = reloadExportDaemon(place, { timeoutMs: 5000 });
      await expect.poll(() => signals, { timeout: 5000 }).toBe(2);
      const read = { ...(await status()), generation: 7, readAtMs: hostMonotonicMs() };
      // By rename, as the daemon does: somebody reads meanwhile.
      await writeFile(`${file()}.new`, JSON.stringify(read));
      await rename(`${file()}.new`, file());
      expect((await answer).generation).toBe(7);
    } finally {
      process.off('SIGHUP', onSignal);
    }
  });
});
