{{- define "fedveil.labels" -}}
labels: {app.kubernetes.io/name: {{ .Release.Name }}}
{{- end }}

{{- define "fedveil.selector" -}}
matchLabels: {app.kubernetes.io/name: {{ .Release.Name }}}
{{- end }}

{{- define "fedveil.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "fedveil.container" -}}
image: {{ .Values.image }}
imagePullPolicy: {{ .Values.imagePullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  privileged: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "fedveil.resources" -}}
requests: {cpu: "1", memory: {{ .Values.memory }}}
limits: {cpu: {{ .Values.cpus | quote }}, memory: {{ .Values.memory }}{{ with .Values.gpus }}, nvidia.com/gpu: {{ . }}{{ end }}}
{{- end }}

{{- define "fedveil.keys" -}}
- name: keys
  {{- include "fedveil.container" . | nindent 2 }}
  command: [sh, -c, {{ printf "install -m 0600 /keys/* %s/" .folder | quote }}]
  resources:
    requests: {cpu: 100m, memory: 64Mi}
    limits: {cpu: "1", memory: 64Mi}
  volumeMounts:
    - {name: keys, mountPath: /keys, readOnly: true}
    - {name: folder, mountPath: {{ .folder }}}
{{- end }}

{{- define "fedveil.volumes" -}}
- name: keys
  secret: {secretName: {{ .Release.Name }}, defaultMode: 0400}
- name: folder
  emptyDir: {medium: Memory, sizeLimit: 16Mi}
- name: tmp
  emptyDir: {sizeLimit: 2Gi}
{{- end }}

{{- define "fedveil.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .Values.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources: {requests: {storage: {{ .size }}}}
{{- end }}
