import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { MIB } from '../../src/lib/units.js';
import { exportAt } from '../../src/nbd/uri.js';
import type { TlsOptions } from '../../src/nbd/index.js';
import { freePort } from '../lab/port.js';
import { makeAuthority, makeKeys } from '../exportd/tls.js';
import { makeLabDirectory } from '../lab/directory.js';
import { firstDifference, makeRaw } from '../lab/disk-image.js';
import { answersOnSocket, startLabServer, type LabServer } from '../lab/server.js';
import { startSshd, type LabSshd } from '../lab/sshd.js';
import { disk, expectedDigest, startCaptureRig, startPush, type CaptureRig } from './rig.js';

const DISK_BYTES = 64 * MIB;
const WAIT = { timeout: 15_000, interval: 20 };

async function makeTruth(rig: CaptureRig): Promise<string> {
  const file = rig.lab.file('truth.raw');
  await makeRaw({ path: file, sizeBytes: DISK_BYTES, regions: [{ offset: 1000, length: 48 * MIB }] });
  return file;
}

describe('through an ssh tunnel', () => {
  let rig: CaptureRig;
  let sshd: LabSshd;
  let truth: string;
  const undo = new CleanupStack();
  beforeAll(async () => {
    rig = undo.use(await startCaptureRig());
    sshd = undo.use(await startSshd(rig.lab));
    truth = await makeTruth(rig);
  });
  afterAll(() => undo.run());

  /** `ssh -L`, as the page tells users: from a socket of ours to the port of the export daemon over there. */
  async function tunnel(socketPath: string): Promise<LabServer> {
    const options = [`Port=${sshd.port}`, `UserKnownHostsFile=${sshd.knownHostsFile}`, 'BatchMode=yes'];
    const forward = `${socketPath}:127.0.0.1:${rig.exportd.port}`;
    return startLabServer(
      'ssh',
      [
        ...['-N', '-F', 'none', '-i', sshd.keyFile, '-L', forward],
        ...[...options, 'ExitOnForwardFailure=yes', 'StreamLocalBindUnlink=yes'].flatMap((it) => ['-o', it]),
        'root@127.0.0.1',
      ],
      { isReady: () => answersOnSocket(socketPath, '', /^NBDMAGIC/) },
    );
  }

  it('a push goes, and goes on when the tunnel broke and is there again', async () => {
    const socketPath = rig.lab.file('tunnel.sock');
    const layer = await rig.addLayer('tunnelled', { sizeBytes: DISK_BYTES });
    const uri = exportAt(`nbd+unix:///?socket=${socketPath}`, 'tunnelled');
    await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
    const first = await tunnel(socketPath);
    const started = startPush([disk(source, uri)], { bytesPerSecond: 8 * MIB });
    await expect.poll(() => started.reports.at(-1)?.[0]?.progress.bytesWritten, WAIT).toBeGreaterThan(MIB);
    await first.kill();
    await expect.poll(() => started.notes.length, WAIT).toBeGreaterThan(0);
    await using _second = await tunnel(socketPath);
    await started.ended;
    expect(started.completed.get('vda')?.sumsDigest).toBe(await expectedDigest(truth));
    expect(await firstDifference(truth, await layer.read())).toBeNull();
  });
});

describe('over TLS', () => {
  const retryMs = 60_000;

  async function expectPush(
    rig: CaptureRig,
    uri: string,
    { right, wrong }: { right: TlsOptions; wrong: TlsOptions[] },
  ): Promise<void> {
    const truth = await makeTruth(rig);
    await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
    for (const tls of wrong) {
      const at = performance.now();
      const refused = startPush([disk(source, uri, { tls })], { retryMs });
      await expect(refused.ended).rejects.toMatchObject({
        code: 'NBD_CONNECT',
        message: expect.stringMatching(/^the export for disk vda: /) as string,
      });
      expect(performance.now() - at).toBeLessThan(10_000);
    }
    const started = startPush([disk(source, uri, { tls: right })], { retryMs });
    await started.ended;
    expect(started.completed.get('vda')?.sumsDigest).toBe(await expectedDigest(truth));
  }

  it('a pre-shared key lets in; another one, none and another user are refused at once', async () => {
    const port = await freePort();
    await using undo = new CleanupStack();
    const lab = undo.use(await makeLabDirectory());
    const keysFile = await makeKeys(lab.file('agents.psk'), 'agent7');
    const settings = { tcp: { port, tls: 'psk' }, tls: { psk: { keysFile } } };
    const rig = undo.use(await startCaptureRig({ port, settings }));
    await rig.addLayer('layer', { sizeBytes: DISK_BYTES });
    await expectPush(rig, `nbds://127.0.0.1:${port}/layer`, {
      right: { pskFile: keysFile, username: 'agent7' },
      wrong: [
        { pskFile: await makeKeys(lab.file('other.psk'), 'agent7'), username: 'agent7' },
        { pskFile: await makeKeys(lab.file('stranger.psk'), 'mallory'), username: 'mallory' },
      ],
    });
    await using source = await rig.source({
      kind: 'image',
      path: rig.lab.file('truth.raw'),
      format: 'raw',
      bitmap: null,
    });
    const plain = startPush([disk(source, `nbd://127.0.0.1:${port}/layer`)], { retryMs });
    await expect(plain.ended).rejects.toMatchObject({ code: 'NBD_CONNECT' });
  });

  it('a certificate lets in; one of another authority is refused at once', async () => {
    const port = await freePort();
    await using undo = new CleanupStack();
    const lab = undo.use(await makeLabDirectory());
    const authority = await makeAuthority(lab.file('ca'));
    const stranger = await makeAuthority(lab.file('other-ca'));
    const x509 = { directory: authority.serverDirectory };
    const settings = { tcp: { port, tls: 'x509' }, tls: { x509 } };
    const rig = undo.use(await startCaptureRig({ port, settings }));
    await rig.addLayer('layer', { sizeBytes: DISK_BYTES });
    await expectPush(rig, `nbds://127.0.0.1:${port}/layer`, {
      right: { certificates: await authority.clientDirectory('agent7') },
      wrong: [{ certificates: await stranger.clientDirectory('agent7') }],
    });
  });
});
