import type { DeviceFacts } from './device-facts.js';
import type { ListedDevice } from './lsblk.js';
import { MAX_IDENTITY_LENGTH, type IdentityKind } from './provider.js';

/** A device with what is known of it. */
export interface KnownDevice {
  listed: ListedDevice;
  facts: DeviceFacts;
}

/** What vendors put where a serial number belongs: one character again and again. */
const ONE_CHARACTER = /^(.)\1*$/;
const ZEROES = /^(?:0x)?0*$/;
/** In a text for people: nothing that moves the cursor or ends a line. */
const CONTROL_CHARACTERS = /\p{Cc}/gu;
const HEXADECIMAL_NAME = /^(?:0x|naa\.)((?:[0-9a-f]{16}){1,2})$/i;
/** The kernel's and udev's names of an NVMe namespace: by EUI-64 or NGUID, by UUID, by serial and model. */
const NVME_NAME = /^(?:eui|uuid|nvme)\./;

/**
 * The identities of a device, best first. Whether it is the only one that has them is another question: `parents` are
 * the devices that it stands on.
 */
export function identitiesOf({ listed, facts }: KnownDevice, parents: readonly KnownDevice[]): string[] {
  const hardware = listed.type === 'disk' ? hardwareIdentities(listed, facts) : [];
  const { content } = facts;
  // What stands in a member of an array describes the array, and all members have the same.
  const isMember = content.usage === 'raid' && content.fsType !== 'LVM2_member';
  const found = [
    ...hardware,
    make('dm-uuid', facts.dmUuid),
    make('md-uuid', arrayUuid(facts, parents)),
    make('part-uuid', content.partUuid),
    make('pt-uuid', isMember ? null : content.tableUuid),
    make('fs-uuid', isMember ? null : content.fsUuid),
  ];
  return [...new Set(found.filter((identity) => identity !== null))];
}

function hardwareIdentities(listed: ListedDevice, { udev, wwid, serial }: DeviceFacts): (string | null)[] {
  // The extension tells logical units of one storage system apart, which share the rest.
  const names = [udev.get('ID_WWN_WITH_EXTENSION'), udev.get('ID_WWN'), listed.wwn, wwid];
  const numbers = [listed.serial, udev.get('ID_SERIAL_SHORT'), serial];
  const number = numbers.find((text) => isTelling(text) && !ONE_CHARACTER.test(bare(text)));
  const parts = number === undefined ? null : [listed.vendor, listed.model, number];
  return [
    make(
      'wwn',
      first(names, (name) => HEXADECIMAL_NAME.exec(name)?.[1]?.toLowerCase()),
      '0x',
    ),
    make(
      'nvme',
      first(names, (name) => (NVME_NAME.test(name) ? name : undefined)),
    ),
    make(
      'serial',
      parts
        ?.filter(isTelling)
        .map((part) => part.trim())
        .join('_') ?? null,
    ),
  ];
}

function arrayUuid({ udev }: DeviceFacts, parents: readonly KnownDevice[]): string | null {
  const member = parents.find(({ facts }) => facts.content.fsType === 'linux_raid_member');
  return udev.get('MD_UUID') ?? member?.facts.content.fsUuid ?? null;
}

function first(
  texts: readonly (string | null | undefined)[],
  read: (text: string) => string | undefined,
): string | null {
  for (const text of texts) {
    const found = read(text?.trim() ?? '');
    if (found !== undefined) return found;
  }
  return null;
}

function isTelling(text: string | null | undefined): text is string {
  return !ZEROES.test(bare(text ?? ''));
}

function bare(text: string): string {
  return text.replaceAll(/[\s_.-]/g, '');
}

/** Null for what tells nothing; too long a text is not cut, because two could then become one. */
function make(kind: IdentityKind, value: string | null, prefix = ''): string | null {
  if (!isTelling(value)) return null;
  const identity = `${kind}:${prefix}${plain(value)}`;
  return identity.length > MAX_IDENTITY_LENGTH ? null : identity;
}

/** As udev writes names: white space becomes `_`, anything but plain characters is escaped byte by byte. */
function plain(text: string): string {
  const joined = text.trim().replaceAll(/\s+/g, '_');
  return joined.replaceAll(/[^A-Za-z0-9#+\-.:=@_/]/gu, (character) =>
    [...Buffer.from(character)].map((byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join(''),
  );
}

/** For people: one line, bounded. */
export function displayText(text: string | null): string | null {
  return text?.trim().replaceAll(CONTROL_CHARACTERS, '\ufffd').slice(0, 200) ?? null;
}
