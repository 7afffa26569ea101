import { mkdir, readdir, readFile, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { expect, it } from 'vitest';
import type { RepositoryView, RunView } from '../../src/engine/types.js';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { MIB } from '../../src/lib/units.js';
import { makeLabDirectory } from '../lab/directory.js';
import { makeQcow2 } from '../lab/disk-image.js';
import { domainXml } from '../lab/domain-xml.js';
import { startLibvirt } from '../lab/libvirt.js';
import { backUp, startDaemon } from './daemon.js';
import { discoverOne } from './live-rig.js';

const TPM_STATE = 'tpm2/tpm2-00.permall';

it('UEFI variables and TPM contents of a running machine come back with it', async () => {
  await using cleanup = new CleanupStack();
  const lab = cleanup.use(await makeLabDirectory());
  const libvirt = cleanup.use(await startLibvirt(lab));
  // The daemon sees libvirt's own files where they are on a real host, and nobody else does.
  const script = 'mount --bind "$1" /var/lib/libvirt && shift && exec "$@"';
  const lib = path.join(libvirt.directory, 'lib');
  const daemon = cleanup.use(
    await startDaemon({
      directory: lab.file('daemon'),
      settings: { snapshot: { scratchDirectory: lab.file('scratch') } },
      through: ['unshare', '--mount', '--propagation', 'private', '--', 'sh', '-c', script, 'lab', lib],
    }),
  );
  const variables = await readFile('/usr/share/OVMF/OVMF_VARS_4M.fd');
  variables.write('of this machine alone', 1000);
  const nvramFile = lab.file('vars.fd');
  await writeFile(nvramFile, variables);

  const disk = { target: 'vda', path: lab.file('vda.qcow2') };
  await makeQcow2({ path: disk.path, sizeBytes: MIB });
  await libvirt.define(domainXml({ name: 'whole', disks: [disk], nvramFile, tpm: true }));
  await libvirt.virsh('start', '--paused', 'whole');
  const uuid = (await libvirt.virsh('domuuid', 'whole')).trim();
  const tpmFile = path.join(lib, 'swtpm', uuid, TPM_STATE);
  const tpm = await readFile(tpmFile);
  const root = lab.file('repository');
  const repository = await daemon.expect<RepositoryView>(201, 'POST', '/repositories', {
    name: 'whole',
    root,
  });
  const vm = await discoverOne(daemon, libvirt.uri, 'whole');
  const run = await backUp(daemon, { repository, vm });
  const kept = path.join(root, 'vms', vm.id, 'config', run.pointId ?? '');
  const names = ['domain.xml', 'machine.json', 'nvram.bin', 'tpm.bin'];
  expect((await readdir(kept)).sort()).toEqual(names);
  for (const name of names) expect((await stat(path.join(kept, name))).mode & 0o777).toBe(0o600);

  await libvirt.virsh('destroy', 'whole');
  await libvirt.virsh('undefine', 'whole', '--nvram', '--checkpoints-metadata');
  await expect(stat(nvramFile)).rejects.toMatchObject({ code: 'ENOENT' });
  await expect(stat(tpmFile)).rejects.toMatchObject({ code: 'ENOENT' });
  await mkdir(lab.file('restored'));
  const restore = await daemon.expect<RunView>(202, 'POST', '/restore/vms', {
    pointId: run.pointId,
    uri: libvirt.uri,
    identity: 'same',
    place: { kind: 'directory', path: lab.file('restored') },
  });
  const ended = await daemon.waitForRun(restore.id);
  expect([ended.state, ended.error]).toEqual(['completed', null]);
  expect((await readFile(lab.file('restored/whole-nvram.fd'))).equals(variables)).toBe(true);
  expect((await readFile(tpmFile)).equals(tpm)).toBe(true);
  await libvirt.virsh('start', '--paused', uuid);
  await libvirt.virsh('destroy', uuid);
}, 90_000);
