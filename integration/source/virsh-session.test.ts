import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { VirshSession } from '../../src/libvirt/virsh-session.js';
import { makeLabDirectory } from '../lab/directory.js';
import { domainXml } from '../lab/domain-xml.js';
import { findDescendants } from '../lab/leftovers.js';
import { startLibvirt, type LabLibvirt } from '../lab/libvirt.js';

const cleanup = new CleanupStack();
let libvirt: LabLibvirt;
let options: { uri: string; timeoutMs: number };

beforeAll(async () => {
  const lab = cleanup.use(await makeLabDirectory());
  libvirt = cleanup.use(await startLibvirt(lab));
  await libvirt.define(domainXml({ name: 'one' }));
  options = { uri: libvirt.uri, timeoutMs: 20_000 };
});

afterAll(() => cleanup.run());

describe('a virsh that stays connected', () => {
  it('answers one command after the other, also after one that failed', async () => {
    await using session = await VirshSession.open(options);
    const before = await findDescendants();
    for (let round = 0; round < 3; round += 1) {
      expect(await session.run(['domstate', '--domain', 'one'], options)).toContain('shut off');
      await expect(session.run(['domstate', '--domain', 'two'], options)).rejects.toMatchObject({
        code: 'NOT_FOUND',
        message: "virsh domstate: failed to get domain 'two'",
      });
    }
    expect(await findDescendants()).toEqual(before);
  });

  it.each(['it\'s  "two" words; $quit `x` \\ \' #', '--', 'ümläut 漢字', 'a\nquit\tb'])(
    'takes an argument as the text it is: %j',
    async (text) => {
      await using session = await VirshSession.open(options);
      expect((await session.run(['echo', '--', text], options)).trimEnd()).toBe(text);
      expect(await session.run(['domstate', '--domain', 'one'], options)).toContain('shut off');
    },
  );

  it('does not let one command wait for another, and ends with one that takes too long', async () => {
    await using session = await VirshSession.open(options);
    const wait = ['event', '--event', 'lifecycle', '--timeout', '30'];
    const waiting = session.run(wait, { ...options, timeoutMs: 1500 }).catch((error: unknown) => error);
    const startedMs = performance.now();
    expect(await session.run(['domstate', '--domain', 'one'], options)).toContain('shut off');
    expect(performance.now() - startedMs).toBeLessThan(1400);
    expect(await waiting).toMatchObject({ code: 'TIMEOUT' });
    expect(await session.run(['domstate', '--domain', 'one'], options)).toContain('shut off');
  });

  it('says what happened when libvirt goes away, and finds it again', async () => {
    await using session = await VirshSession.open(options);
    await libvirt.kill();
    await expect(session.run(['domstate', '--domain', 'one'], options)).rejects.toMatchObject({
      code: 'SOURCE_UNREACHABLE',
    });
    await libvirt.restart();
    expect(await session.run(['domstate', '--domain', 'one'], options)).toContain('shut off');
  });

  it('is none where there is no libvirt, and leaves no process', async () => {
    const before = await findDescendants();
    const uri = `${libvirt.uri}-nowhere`;
    await expect(VirshSession.open({ ...options, uri })).rejects.toMatchObject({
      code: 'SOURCE_UNREACHABLE',
    });
    await (await VirshSession.open(options))[Symbol.asyncDispose]();
    expect(await findDescendants()).toEqual(before);
  });
});
