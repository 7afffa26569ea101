import { mkdir, readdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import type { RunEvent, RunView } from '../../src/engine/types.js';
import { killDaemon, restart, waitForChild, waitForStage } from '../daemon/crash.js';
import { backUp, setUp, type Setup } from '../daemon/daemon.js';
import { expectNothingLeft, imageDisk, startRig, stopRig, type Rig } from '../daemon/rig.js';
import { MachineLab, TARGETS, UUID } from './machine-lab.js';

/** The restore of a machine as a run of the daemon. Its points are of images, and given a machine's files by hand. */
describe('a run that restores a machine', { timeout: 60_000 }, () => {
  let m: MachineLab;
  let rig: Rig;
  let setup: Setup;
  let pointId: string;

  beforeAll(async () => {
    m = await MachineLab.start();
    rig = await startRig();
    setup = await setUp(rig.daemon, {
      root: rig.lab.file('repository'),
      disks: TARGETS.map((name) => ({ name, source: imageDisk(m.truths[name]) })),
    });
    pointId = (await backUp(rig.daemon, setup)).pointId ?? '';
  }, 60_000);
  afterAll(async () => {
    await stopRig(rig);
    await m[Symbol.asyncDispose]();
  });

  beforeEach(async () => {
    await m.begin();
    const disks = setup.vm.disks.map(({ id, name }) => ({ diskId: id, target: name }));
    const { configFiles } = await m.pointOf({ disks });
    const directory = path.join(setup.repository.root, 'vms', setup.vm.id, 'config', pointId);
    await mkdir(directory, { recursive: true });
    for (const { name, content } of configFiles) await writeFile(path.join(directory, name), content);
  });
  afterEach(() => m.end());

  const request = (change: Record<string, unknown> = {}): Promise<RunView> =>
    rig.daemon.expect<RunView>(202, 'POST', '/restore/vms', {
      pointId,
      uri: m.libvirt.uri,
      name: 'db two',
      identity: 'new',
      place: { kind: 'directory', path: m.out },
      ...change,
    });

  const finished = async (run: RunView): Promise<RunView> => {
    const ended = await rig.daemon.waitForRun(run.id);
    await expectNothingLeft(rig, setup.repository.root);
    expect(await readdir(path.join(rig.daemon.stateDirectory, 'restores'))).toEqual([]);
    return ended;
  };

  it('defines it, starts it where that is asked, and says what differs', async () => {
    const run = await finished(await request({ start: true }));
    expect([run.state, run.error]).toEqual(['completed', null]);
    const machine = run.result?.kind === 'restore' ? run.result.machine : null;
    expect(machine).toMatchObject({ name: 'db two', isStarted: true });
    const uuid = machine?.uuid ?? '';
    expect(await m.virsh('domstate', uuid)).toBe('running');
    await m.virsh('destroy', uuid);
    await m.expectDisks(await m.domainOf(uuid));
    const { items } = await rig.daemon.expect<{ items: RunEvent[] }>(200, 'GET', `/runs/${run.id}/log`);
    const codes = items.map(({ code }) => code);
    expect(codes).toEqual(expect.arrayContaining(['MACHINE_NOTE', 'MACHINE_DEFINED', 'MACHINE_STARTED']));
  });

  it('replaces all disks of a domain or none: damage in the second leaves the first as it was', async () => {
    const before = await readFile(`${m.old}/vda.qcow2`);
    const layers = path.join(
      setup.repository.root,
      'vms',
      setup.vm.id,
      'layers',
      setup.vm.disks[1]?.id ?? '',
    );
    const layer = path.join(layers, (await readdir(layers)).find((name) => name.endsWith('.qcow2')) ?? '');
    const content = await readFile(layer);
    const bad = Buffer.from(content);
    // A layer this small ends with its only L2 table; before that lies data.
    bad.fill(0x55, bad.length - 65_536 - 4096, bad.length - 65_536);
    await writeFile(layer, bad);
    try {
      const run = await finished(await request({ identity: 'replace', name: null, place: null }));
      expect([run.state, run.error?.code]).toEqual(['failed', 'LAYER_CORRUPT']);
      expect((await readFile(`${m.old}/vda.qcow2`)).equals(before)).toBe(true);
      const other = await finished(await request());
      expect([other.state, other.error?.code]).toEqual(['failed', 'LAYER_CORRUPT']);
      expect(await readdir(m.out)).toEqual([]);
      expect(await m.listUuids()).toEqual([UUID]);
    } finally {
      await writeFile(layer, content);
    }
    const run = await finished(await request({ identity: 'replace', name: null, place: null }));
    expect(run.state).toBe('completed');
    await m.expectDisks(await m.domainOf(UUID));
  });

  it('leaves nothing behind a daemon that is killed, and the same restore works after', async () => {
    const run = await request();
    const writer = await waitForChild(rig, 'qemu-nbd', m.out);
    process.kill(writer, 'SIGSTOP');
    await waitForStage(rig, run.id, 'transfer');
    await killDaemon(rig);
    await restart(rig);
    expect((await finished(run)).state).toBe('interrupted');
    expect(await readdir(m.out)).toEqual([]);
    expect(await m.listUuids()).toEqual([UUID]);
    expect((await finished(await request())).state).toBe('completed');
  });

  it('is refused at once where it can never be right', async () => {
    for (const change of [
      { uri: 'qemu+ssh://root@there/system' },
      { uri: 'test:///default' },
      { name: '../x' },
      { name: 'a\nb' },
      { identity: 'replace' },
      { place: null },
      { place: { kind: 'directory', path: 'relative' } },
    ]) {
      const answer = await rig.daemon.request('POST', '/restore/vms', {
        ...{ pointId, uri: m.libvirt.uri, name: 'x', identity: 'new' },
        ...{ place: { kind: 'directory', path: m.out }, ...change },
      });
      expect([answer.status, (answer.body as { code: string }).code], JSON.stringify(change)).toEqual([
        422,
        'INVALID_INPUT',
      ]);
    }
    const run = await finished(await request({ place: { kind: 'directory', path: setup.repository.root } }));
    expect([run.state, run.error?.code]).toEqual(['failed', 'TARGET_FORBIDDEN']);
  });
});
