import { randomUUID } from 'node:crypto';

export interface LabDisk {
  /** `vda`, `sda`, … */
  target: string;
  /** Of a file, or of a block device with `type: 'block'`. Absent: an empty drive. */
  path?: string;
  type?: 'file' | 'block';
  format?: 'raw' | 'qcow2';
  serial?: string;
  readonly?: boolean;
  shareable?: boolean;
  device?: 'disk' | 'cdrom' | 'lun';
  /** Default by the target: virtio, scsi (`sd…`), sata for a CD-ROM. */
  bus?: 'virtio' | 'scsi' | 'sata' | 'ide';
  /** More attributes of `<driver>`, e.g. `cache='none'`. */
  driver?: string;
}

export interface LabDomain {
  name: string;
  uuid?: string;
  disks?: readonly LabDisk[];
  /** Default 16: without a guest system, nothing needs more. */
  memoryMib?: number;
  kernel?: string;
  initrd?: string;
  cmdline?: string;
  /** The serial console goes to this file. */
  serialFile?: string;
  /** `org.qemu.guest_agent.0`; libvirt chooses the socket. */
  agentChannel?: boolean;
  /** OVMF without secure boot; the variables are kept in this file, made at the first start. */
  nvramFile?: string;
  /** An emulated TPM 2.0, by swtpm. */
  tpm?: boolean;
  /** A virtio card of user networking, with this MAC. */
  mac?: string;
  /** Content of `<metadata>`. */
  metadata?: string;
  /** More elements of `<domain>`, of `<devices>`. */
  extra?: string;
  extraDevices?: string;
}

/** A domain that starts under emulation in well under a second when started paused (`virsh start --paused`). */
export function domainXml(domain: LabDomain): string {
  return `<domain type='qemu'>
  <name>${escapeXml(domain.name)}</name>
  <uuid>${domain.uuid ?? randomUUID()}</uuid>
  ${domain.metadata === undefined ? '' : `<metadata>${domain.metadata}</metadata>`}
  <memory unit='MiB'>${domain.memoryMib ?? 16}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    ${firmware(domain.nvramFile)}
    ${element('kernel', domain.kernel)}${element('initrd', domain.initrd)}${element('cmdline', domain.cmdline)}
  </os>
  <features><acpi/></features>
  ${domain.kernel === undefined ? '' : "<cpu mode='maximum'/>"}
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  ${domain.extra ?? ''}
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    ${(domain.disks ?? []).map(diskXml).join('\n    ')}
    <controller type='usb' model='none'/>
    <controller type='scsi' model='virtio-scsi'/>
    ${serial(domain.serialFile)}
    ${channel(domain.agentChannel)}
    ${domain.mac === undefined ? '' : `<interface type='user'><mac address='${domain.mac}'/><model type='virtio'/></interface>`}
    ${domain.tpm === true ? "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>" : ''}
    <memballoon model='none'/>
    ${domain.extraDevices ?? ''}
  </devices>
</domain>
`;
}

const OVMF = '/usr/share/OVMF';

function firmware(nvramFile: string | undefined): string {
  if (nvramFile === undefined) return '';
  return (
    `<loader readonly='yes' type='pflash'>${OVMF}/OVMF_CODE_4M.fd</loader>` +
    `<nvram template='${OVMF}/OVMF_VARS_4M.fd'>${escapeXml(nvramFile)}</nvram>`
  );
}

function diskXml(disk: LabDisk): string {
  const { type = 'file', format = 'qcow2', device = 'disk' } = disk;
  const source =
    disk.path === undefined ? '' : `<source ${type === 'file' ? 'file' : 'dev'}='${escapeXml(disk.path)}'/>`;
  return (
    `<disk type='${type}' device='${device}'><driver name='qemu' type='${format}' ${disk.driver ?? ''}/>${source}` +
    `<target dev='${disk.target}' bus='${disk.bus ?? defaultBus(disk)}'/>${element('serial', disk.serial)}` +
    `${disk.readonly === true ? '<readonly/>' : ''}${disk.shareable === true ? '<shareable/>' : ''}</disk>`
  );
}

function defaultBus(disk: LabDisk): string {
  if (disk.device === 'cdrom') return 'sata';
  return disk.target.startsWith('sd') ? 'scsi' : 'virtio';
}

function serial(file: string | undefined): string {
  if (file === undefined) return '';
  return `<serial type='file'><source path='${escapeXml(file)}'/><target port='0'/></serial>`;
}

function channel(wanted: boolean | undefined): string {
  if (wanted !== true) return '';
  return "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
}

function element(name: string, text: string | undefined): string {
  return text === undefined ? '' : `<${name}>${escapeXml(text)}</${name}>`;
}

function escapeXml(text: string): string {
  return text.replace(/[&<>'"]/g, (character) => `&#${character.charCodeAt(0)};`);
}
