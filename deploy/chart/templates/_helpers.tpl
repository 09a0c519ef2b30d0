{{- define "poolhouse.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "poolhouse.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "poolhouse.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "poolhouse.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "poolhouse.selector" -}}
app.kubernetes.io/name: {{ include "poolhouse.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "poolhouse.labels" -}}
{{ include "poolhouse.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "poolhouse.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "poolhouse.scheme" -}}
{{ empty .Values.tls.existingSecret | ternary "HTTP" "HTTPS" }}
{{- end }}

{{/* The file of --config: what the user set, and what must fit the pod around it. */}}
{{- define "poolhouse.config" -}}
{{- $config := dict "models" .Values.models "port" 8000 "shutdown_seconds" .Values.shutdownSeconds }}
{{- if .Values.apiKey.existingSecret }}
{{- $config = set $config "api_key_file" "/etc/poolhouse/keys/api-keys" }}
{{- end }}
{{- if .Values.tls.existingSecret }}
{{- $config = merge $config (dict "ssl_certfile" "/etc/poolhouse/tls/tls.crt" "ssl_keyfile" "/etc/poolhouse/tls/tls.key" "enable_ssl_refresh" true) }}
{{- end }}
{{- $last := dict }}
{{- if gt (int .Values.gpu.count) 1 }}
{{- $last = dict "replicas" (int .Values.gpu.count) }}
{{- end }}
{{- merge $config .Values.config $last | toYaml }}
{{- end }}

{{/* Without more room than replicas need, so that a burst does not start some only to stop them. */}}
{{- define "poolhouse.scaling" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - type: Percent
      value: 100
      periodSeconds: 60
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleDownSeconds }}
  policies:
    - type: Pods
      value: 1
      periodSeconds: 60
{{- end }}
