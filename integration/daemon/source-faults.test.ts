import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { VmView } from '../../src/engine/types.js';
import type { Page } from '../../src/engine/types.js';
import { MIB } from '../../src/lib/units.js';
import { makeRaw } from '../lab/disk-image.js';
import { nbdUnixUri, startNbdkit, startQemuNbd, type LabNbdServer } from '../lab/nbd-server.js';
import { setUp, startBackup, type Setup } from './daemon.js';
import {
  cutAfter,
  expectFailed,
  expectFailure,
  expectGoodBackup,
  expectNothingLeft,
  listen,
  nbdDisk,
  startRig,
  stopRig,
  waitUntilCopying,
  type Rig,
} from './rig.js';

const DISK_BYTES = 16 * MIB;
const SLOW = 3 * MIB;

describe('a source that fails', () => {
  let rig: Rig;
  let truth: string;

  beforeAll(async () => {
    rig = await startRig({ nbd: { requestBytes: 64 * 1024, stallTimeoutMs: 2000, connectTimeoutMs: 2000 } });
    truth = rig.lab.file('disk.raw');
    await makeRaw({ path: truth, sizeBytes: DISK_BYTES, regions: [{ offset: 0, length: DISK_BYTES - MIB }] });
  });

  afterAll(() => stopRig(rig));

  const serve = (name: string): Promise<LabNbdServer> =>
    startQemuNbd({ image: truth, format: 'raw', socketPath: rig.lab.file(`${name}.sock`), isReadOnly: true });

  const setUpWith = (name: string, uri: string): Promise<Setup> =>
    setUp(rig.daemon, {
      root: rig.lab.file(`repository-${name}`),
      vmName: name,
      disks: [{ name: 'vda', source: nbdDisk(uri) }],
    });

  const addVm = (name: string, uri: string): ReturnType<Rig['daemon']['request']> =>
    rig.daemon.request('POST', '/vms', { name, disks: [{ name: 'vda', source: nbdDisk(uri) }] });

  const expectNoVm = async (name: string): Promise<void> => {
    const { items } = await rig.daemon.expect<Page<VmView>>(200, 'GET', '/vms?limit=100');
    expect(items.filter((vm) => vm.name === name)).toEqual([]);
  };

  it.each([
    ['no scheme', 'localhost:10809'],
    ['another scheme', 'http://localhost/x'],
    ['no socket', 'nbd+unix:///x'],
    ['a relative socket', 'nbd+unix:///x?socket=x.sock'],
    ['a file named inside', 'nbds://localhost/x?tls-psk-file=/etc/shadow'],
    ['a password', 'nbd://me:secret@localhost/x'],
    ['bad percent-encoding', 'nbd://localhost/%zz'],
    ['a NUL', 'nbd://localhost/%00'],
    ['a port that is none', 'nbd://localhost:99999/x'],
    ['a dash in front', '--help'],
  ])('is refused when its address is malformed: %s', async (_what, uri) => {
    const answer = await addVm('malformed', uri);
    expect(answer.status, JSON.stringify(answer.body)).toBe(422);
    expect(answer.body).toMatchObject({ code: 'NBD_URI_INVALID' });
    expect(JSON.stringify(answer.body)).not.toContain('secret');
    await expectNoVm('malformed');
  });

  it('is refused when nobody listens there, and later when nobody does any more', async () => {
    const socketPath = rig.lab.file('nobody.sock');
    const answer = await addVm('nobody', nbdUnixUri(socketPath, ''));
    expect([answer.status, answer.body]).toMatchObject([502, { code: 'NBD_CONNECT' }]);
    await expectNoVm('nobody');

    const server = await serve('nobody');
    const setup = await setUpWith('nobody', server.uri);
    await server.stop();
    await expectFailure(rig, setup, { code: 'NBD_CONNECT' });
    await using again = await serve('nobody');
    expect(again.uri).toBe(server.uri);
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('is refused when the server does not know the export', async () => {
    await using server = await serve('unknown');
    const answer = await addVm('unknown', nbdUnixUri(server.socketPath, 'another'));
    expect([answer.status, answer.body]).toMatchObject([502, { code: 'NBD_CONNECT' }]);
  });

  it('never waits for ever on a server that accepts and says nothing', async () => {
    await using silent = await listen(() => undefined);
    const startedMs = performance.now();
    const answer = await addVm('silent', `nbd://127.0.0.1:${silent.port}/`);
    expect(answer.status).toBeGreaterThanOrEqual(500);
    expect(answer.body).toMatchObject({ code: 'NBD_STALLED' });
    expect(performance.now() - startedMs).toBeLessThan(5000);
    await expectNoVm('silent');
  });

  it('ends a run whose server accepts and says nothing, and the next one is good', async () => {
    await using server = await serve('mute');
    let isMute = false;
    const forward = cutAfter(server.socketPath, { bytes: Infinity });
    await using proxy = await listen((socket) => {
      if (!isMute) forward(socket);
    });
    const setup = await setUpWith('mute', `nbd://127.0.0.1:${proxy.port}/`);
    isMute = true;
    await expectFailure(rig, setup, { code: 'NBD_STALLED' });
    isMute = false;
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('ends a run whose server drops the connection in the middle of the copy', async () => {
    await using server = await serve('drop');
    const limit = { bytes: Infinity };
    await using proxy = await listen(cutAfter(server.socketPath, limit));
    const setup = await setUpWith('drop', `nbd://127.0.0.1:${proxy.port}/`);
    limit.bytes = 5 * MIB;
    const run = await expectFailure(rig, setup, { code: 'NBD_PROTOCOL' });
    expect(run.stage).toBe('transfer');
    limit.bytes = Infinity;
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('ends a run whose server is killed in the middle of the copy', async () => {
    await using server = await serve('killed');
    const setup = await setUpWith('killed', server.uri);
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    await waitUntilCopying(rig.daemon, run.id);
    await server.kill();
    await expectFailed(rig, setup, { run, code: 'NBD_PROTOCOL' });
    await using _again = await serve('killed');
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('calls a server that stops answering in the middle of the copy stalled, within its time', async () => {
    await using server = await serve('frozen');
    const setup = await setUpWith('frozen', server.uri);
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    await waitUntilCopying(rig.daemon, run.id);
    server.freeze();
    const startedMs = performance.now();
    await expectFailed(rig, setup, { run, code: 'NBD_STALLED' });
    expect(performance.now() - startedMs).toBeLessThan(5000);
    server.thaw();
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('is refused when it has another size on the next connection than it said before', async () => {
    const options = { socketPath: rig.lab.file('size.sock'), plugin: ['file', truth], isReadOnly: true };
    const honest = await startNbdkit(options);
    const setup = await setUpWith('size', honest.uri);
    await honest.stop();
    // The two connections of the look before the run see the whole disk, the copy's less of it.
    const counter = rig.lab.file('size.count');
    const count = `n=$(cat ${counter} 2>/dev/null || echo 0); echo $((n + 1)) > ${counter}`;
    const liar = await startNbdkit({
      ...options,
      plugin: ['eval'],
      parameters: [
        `get_size=${count}; if [ $n -lt 2 ]; then echo ${DISK_BYTES}; else echo ${DISK_BYTES - MIB}; fi`,
        `pread=dd if=${truth} skip=$4 count=$3 iflag=count_bytes,skip_bytes bs=1M status=none`,
      ],
    });
    await expectFailure(rig, setup, { code: 'SOURCE_SIZE_MISMATCH' });
    await liar.stop();
    await using again = await startNbdkit(options);
    expect(again.uri).toBe(honest.uri);
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('fails when one read in a hundred does, and never calls that a success', async () => {
    const options = {
      socketPath: rig.lab.file('error.sock'),
      plugin: ['file', truth],
      isReadOnly: true,
    };
    const good = await startNbdkit(options);
    const setup = await setUpWith('error', good.uri);
    await good.stop();
    // 240 reads of 64 KiB: a run may get through by luck, but then it is whole.
    const ends: string[] = [];
    for (let attempt = 0; attempt < 4; attempt += 1) {
      // Anew each time: nbdkit 1.32 aborts when a client leaves while it still answers.
      await using _faulty = await startNbdkit({
        ...options,
        filters: ['error'],
        parameters: ['error-pread=EIO', 'error-pread-rate=1%'],
      });
      const run = await startBackup(rig.daemon, setup, { type: 'full' });
      const ended = await rig.daemon.waitForRun(run.id);
      ends.push(`${ended.state} ${ended.error?.code ?? ''}`);
      await expectNothingLeft(rig, setup.repository.root);
    }
    expect(ends).toContain('failed NBD_REQUEST');
    expect(ends.filter((end) => end !== 'failed NBD_REQUEST' && end !== 'completed ')).toEqual([]);
    await using _again = await startNbdkit(options);
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });
});
